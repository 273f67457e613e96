"""Both halves of a LoRA algorithm over the tiny model, fed with factors drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fedloom.common import registry
from fedloom.data.batching import Plan, collate, round_indices
from fedloom.data.tokenization import TokenSequence
from fedloom.messages.types import Payload, Update
from fedloom.models.attach import Models
from fedloom.models.loading import Base
from fedloom.models.lowrank import LowRank, relative_gap
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.trainer import LocalRun
from tests.helpers import tiny

RANK, ALPHA = 3, 6  # s = 2, so a rule that forgets s is off by half
CLIENTS = {"a": 1, "b": 3, "c": 4}  # examples


def models(ranks: dict[str, int] | None = None, rank: int = RANK, **adapter: Any) -> Models:
    base = Base(tiny.causal_lm().requires_grad_(False), tiny.tokenizer(), "")
    return Models(
        ModelConfig(name="tiny"), AdapterConfig(rank=rank, alpha=ALPHA, ranks=ranks, **adapter), 0, _base=base
    )


def half(name: str, of: Models, **options: Any) -> Any:
    cls = registry.algorithms.get(name)
    return cls(cls.Options(**options), of.seed, of.adapter)


def server(name: str, ranks: dict[str, int] | None = None, of: Models | None = None, **options: Any) -> Any:
    of = of or models(ranks)
    algorithm = half(name, of, **options)
    algorithm.server_model(of)
    return algorithm


def client(name: str, of: Models, **options: Any) -> Any:
    algorithm = half(name, of, **options)
    algorithm.client_model(of, Payload())
    return algorithm


def drawn(algorithm: Any, seed: int = 0, size: float = 0.1) -> list[Update]:
    """An update of every client, random, of the shapes that the algorithm expects of it."""
    draw = torch.Generator().manual_seed(seed)
    updates = []
    for name, examples in CLIENTS.items():
        shapes = algorithm.layout_for(name).shapes
        tensors = {n: size * torch.randn(s, generator=draw) for n, s in shapes.items()}
        updates.append(Update(name, 1, Payload(tensors), num_examples=examples, num_tokens=100))
    for update in updates:
        algorithm.accept(update)
    return updates


def learned(algorithm: Any, updates: list[Update]) -> dict[str, LowRank]:
    """Base weight → Σ p_k s·B_k·A_k in float64, by its definition; factors that did not travel are the server's."""
    shares = np.array([u.num_examples for u in updates]) / sum(u.num_examples for u in updates)
    shared = algorithm.shared.snapshot().views
    result = {}
    for p in algorithm.pairs:
        terms = []
        for share, update in zip(shares, updates, strict=True):
            own = {**shared, **update.payload.tensors}
            terms.append((float(share) * ALPHA / RANK, own[p.b].double(), own[p.a].double()))
        result[p.weight] = LowRank.stack(terms)
    return result


def result(algorithm: Any) -> dict[str, LowRank]:
    """Base weight → what is deployed there: s·B·A and the base delta, in float64."""
    deployed = algorithm.deployed()
    views, delta = deployed.adapter.views, deployed.base_delta or {}
    found = {}
    for p in algorithm.pairs:
        low = LowRank(ALPHA / RANK * views[p.b].double(), views[p.a].double())
        if p.weight in delta:
            dense = delta[p.weight].double()
            low = low.plus(LowRank(dense, torch.eye(dense.shape[1], dtype=torch.float64)))
        elif f"{p.weight}.B" in delta:
            low = low.plus(LowRank(delta[f"{p.weight}.B"].double(), delta[f"{p.weight}.A"].double()))
        found[p.weight] = low
    return found


def gap_after(algorithm: Any, updates: list[Update]) -> float:
    """‖deployed − Σ p_k ΔW_k‖ / ‖Σ p_k ΔW_k‖ after aggregating `updates`, from the factors."""
    exact = learned(algorithm, updates)
    algorithm.aggregate(iter(updates))
    return relative_gap(result(algorithm), exact)


SEQUENCES = [
    TokenSequence(np.random.default_rng(i).integers(3, 259, 6 + 5 * (i % 4)).astype(np.int32), 2 + i % 3)
    for i in range(16)
]


def local_run(algorithm: Any, round: int = 1, **train: Any) -> LocalRun:
    config = TrainConfig(**{"steps": 3, "lr": 1e-2, "schedule": "constant", **train})

    def steps() -> Iterator[list[Any]]:
        for passes in round_indices(range(16), Plan(2, 1, config.steps, None), round, 0, "c"):
            yield [collate([SEQUENCES[i] for i in indices], packed=True, pad=3, examples=indices) for indices in passes]

    return LocalRun(algorithm.model, steps, config, 0, 100)


def trained(algorithm: Any, payload: Payload, name: str = "a", round: int = 1, **train: Any) -> Payload:
    """One client's turn: what it sends after `payload` and some steps of real training."""
    states = vars(algorithm).setdefault("states_of_the_test", {})
    algorithm.begin(name, round, states.get(name))
    algorithm.receive(payload)
    algorithm.local_training(local_run(algorithm, round, **train))
    sent = Payload({n: t.detach().clone() for n, t in algorithm.shared_state().tensors.items()})
    states[name] = algorithm.client_state()
    return sent
