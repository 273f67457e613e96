"""Rounds without a run: a server over two made-up tensors, and clients that train the tiny model in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedloom.algorithms.base import Algorithm
from fedloom.common import registry
from fedloom.data.batching import Plan, collate, round_indices
from fedloom.data.tokenization import TokenSequence
from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.layout import Adapter
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig, TrainConfig
from fedloom.training.trainer import LocalRun
from tests.helpers import tiny

SHAPES = {"a": (3, 4), "b": (5,)}


class Stub:
    """Stands for models and for a model: all that a server's half asks of them."""

    def __init__(self, start: Adapter) -> None:
        self.start = start

    def adapted(self) -> Any:
        return self

    def initial_adapter(self) -> Adapter:
        return self.start.snapshot()


def made(name: str, **options: Any) -> Algorithm:
    cls = registry.algorithms.get(name)
    return cls(cls.Options(**options), 0, AdapterConfig(rank=2, alpha=4))


def server(name: str, start: Mapping[str, torch.Tensor] | None = None, **options: Any) -> Any:
    """A server's half over `start` (zeros of SHAPES where None)."""
    algorithm = made(name, **options)
    algorithm.server_model(Stub(Adapter.of(start or {n: torch.zeros(s) for n, s in SHAPES.items()})))  # type: ignore[arg-type]
    return algorithm


def update(client: str, tensors: Mapping[str, torch.Tensor], examples: int = 1, round: int = 1) -> Update:
    return Update(client, round, Payload(dict(tensors)), num_examples=examples, num_tokens=10 * examples)


def drawn(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(s, generator=draw) for n, s in SHAPES.items()}


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[n].flatten() for n in sorted(tensors)]).double()


def saved(algorithm: Any) -> Payload:
    """Server state as it comes back from disk."""
    return from_bytes(to_bytes(algorithm.server_state()))


def adapted() -> AdaptedModel:
    base = tiny.causal_lm().requires_grad_(False)
    model = attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(rank=2, alpha=4), 0)
    draw = torch.Generator().manual_seed(1)
    model.adapter.flat.copy_(0.1 * torch.randn(model.adapter.layout.numel, generator=draw))
    model.initial.copy_(model.adapter.flat)
    return model


def sequences(seed: int, count: int = 8) -> list[TokenSequence]:
    return [
        TokenSequence(
            np.random.default_rng(100 * seed + i).integers(3, 259, 6 + 5 * (i % 4)).astype(np.int32), 2 + i % 3
        )
        for i in range(count)
    ]


def local_run(model: AdaptedModel, data: list[TokenSequence], config: TrainConfig, round: int = 1) -> LocalRun:
    """A client-round over `data`, without dropout and shuffled by nothing but the round."""
    plan = Plan(config.batch_size, config.accumulation, config.steps)

    def steps():
        for passes in round_indices(range(len(data)), plan, round, 0, "c"):
            yield [collate([data[i] for i in indices], packed=True, pad=3, examples=indices) for indices in passes]

    return LocalRun(model, steps, config, first_step=0, total_steps=config.steps or 1)


class Federation:
    """Clients that train `model` in turn, each keeping its personal state as a client store would.

    Args:
        data: client → its sequences, or whatever `learner`'s loss makes of the client's name.
        learner: wraps the client's half, for a loss of its own.
    """

    def __init__(
        self,
        name: str,
        data: Mapping[str, list[TokenSequence]],
        train: TrainConfig,
        examples: Mapping[str, int] | None = None,
        client: Callable[[], Algorithm] | None = None,
        **options: Any,
    ) -> None:
        self.model = adapted()
        self.server: Any = server(name, self.model.initial_adapter().tensors(), **options)
        self.client: Any = client() if client else made(name, **options)
        self.client.model = self.model
        self.data, self.train = data, train
        self.examples = examples or dict.fromkeys(data, 1)
        self.kept: dict[str, Payload] = {}
        self.sent: list[tuple[str, Payload]] = []
        self.received: list[tuple[str, Payload]] = []

    def train_one(self, client: str, round: int) -> Update:
        payload = from_bytes(to_bytes(self.server.round_payload(client)))
        self.received.append((client, payload))
        self.client.begin(client, round, self.kept.get(client))
        self.client.receive(payload)
        self.client.local_training(local_run(self.model, self.data[client], self.train, round))
        shared = from_bytes(to_bytes(self.client.shared_state()))
        self.kept[client] = from_bytes(to_bytes(self.client.client_state()))
        self.sent.append((client, shared))
        return replace(update(client, {}, self.examples[client], round), payload=shared)

    def round(self, number: int, clients: list[str] | None = None, lost: set[str] | None = None) -> None:
        """One round over `clients`; updates of `lost` never reach the server."""
        taking_part = clients or list(self.data)
        outcomes = (self.train_one(c, number) for c in taking_part)
        self.server.aggregate(u for u in outcomes if u.client not in (lost or set()))
