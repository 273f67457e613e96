"""FedKSeed: train the whole buffer with messages of a few kilobytes: all changes are along K known directions.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes", arXiv 2312.06353. Everybody can draw the same K directions z_j (directions.py), and the weights are always

    w = w₀ − Σ_{j<K} a_j z_j

A client replays w from the a_j, then takes zeroth-order steps (zeroth.py), each along a z_j drawn at random from the K,
and sends for each seed that it used the sum of its steps η ĝ. The server adds their mean: a_j ← a_j + Σ_k p_k a_jk.

Traffic, both ways: (seed, scalar) pairs, or all K scalars once most seeds are used; at most 16 KB at K = 4096, for any
model. The state of a run is K numbers. A client keeps nothing: one that joins late, or missed rounds, replays to the same
bits as the others. The paper's pro variant, which draws seeds by their importance, is not implemented.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import NUMBER, About, Sizes
from fedloom.algorithms.low_traffic.directions import Direction, Directions, Replay, check_coefficients
from fedloom.algorithms.low_traffic.zeroth import check_compile, descend
from fedloom.common.errors import ClientFailed
from fedloom.common.randomness import fork_torch, numpy_generator
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.trainer import FitResult, LocalRun


def _packed(sizes: Sizes, pairs: int) -> int:
    """Bytes of `pairs` (seed, scalar) pairs as `pack` returns them; fewer if a seed was drawn twice."""
    whole: int = NUMBER * sizes.options.seeds
    return min(6 * pairs, whole)


class FedKSeed(base.Algorithm):
    """Attributes:
    coefficients: server half: a, [K] float64.
    """

    properties: ClassVar = base.Properties(parallel=base.ANY_PARALLEL, cohorts=False)
    about: ClassVar = About(
        "low-traffic",
        "seeds with scalars",
        "Qin et al. 2023, arXiv 2312.06353",
        up=lambda s: _packed(s, s.steps),
        down=lambda s: _packed(s, s.steps * s.clients * (s.round - 1)),
        server=lambda s: 8 * s.options.seeds,
        at_most=True,
    )

    class Options(base.AlgorithmOptions):
        seeds: int = Field(4096, ge=1, le=4096, description="K: number of directions")
        epsilon: float = Field(1e-3, gt=0, description="ε: how far from the weights the two losses are taken")

    options: Options

    @classmethod
    def check(cls, options: Any, adapter: AdapterConfig, train: TrainConfig, model: ModelConfig) -> None:
        super().check(options, adapter, train, model)
        check_compile("fedkseed", train)

    def server_model(self, models: Models) -> AdaptedModel:
        model = super().server_model(models)
        self.coefficients = torch.zeros(self.options.seeds, dtype=torch.float64)
        self._prepare(model)
        return model

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        model = super().client_model(models, payload)
        self._prepare(model)
        return model

    def _prepare(self, model: AdaptedModel) -> None:
        self._directions = Directions(self.seed, model.adapter.layout.numel)
        self._replay = Replay(self._directions, model.initial)

    def _weights(self, coefficients: torch.Tensor) -> torch.Tensor:
        used = coefficients.nonzero().flatten().tolist()
        return self._replay.at({Direction(0, j): float(coefficients[j]) for j in used})

    # ------------------------------------------------------------------ server

    def round_payload(self, client: str) -> Payload:
        return Payload(pack(self.coefficients.float()))

    def update_layout(self) -> None:
        return None  # the number of pairs differs between clients

    def accept(self, update: Update) -> None:
        super().accept(update)
        unpack(update.payload.tensors, self.options.seeds)

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        total, examples = torch.zeros_like(self.coefficients), 0
        for update in updates:
            sent = unpack(update.payload.tensors, self.options.seeds)
            total.add_(sent.double(), alpha=update.num_examples)
            examples += update.num_examples
        self.coefficients += total / examples
        used = int(self.coefficients.count_nonzero())
        return {"seeds_used": used, "largest_coefficient": float(self.coefficients.abs().max())}

    def deployed(self, client: str | None = None) -> base.Deployed:
        if client is None:
            self.shared.copy_(self._weights(self.coefficients.float()))
        return super().deployed(client)

    def server_state(self) -> Payload:
        return Payload({"coefficients": self.coefficients})

    def load_server_state(self, state: Payload) -> None:
        self.coefficients.copy_(state.tensors["coefficients"])

    # ------------------------------------------------------------------ client

    def receive(self, payload: Payload) -> None:
        try:
            coefficients = unpack(payload.tensors, self.options.seeds)
        except ValueError as error:
            raise ClientFailed("bad_payload", str(error)) from None
        self.model.adapter.copy_(self._weights(coefficients))

    def local_training(self, run: LocalRun) -> FitResult:
        rng = numpy_generator(self.seed, "seeds", self.round, self.client)
        picked: list[int] = []

        def draw(step: int) -> Iterator[torch.Tensor]:
            picked.append(int(rng.integers(self.options.seeds)))
            yield self._directions.dense(Direction(0, picked[-1]))

        dropout = partial(fork_torch, self.seed, "dropout", self.round)
        result, steps = descend(
            run,
            self,
            draw,
            directions=1,
            epsilon=self.options.epsilon,
            dropout=lambda step: dropout(run.ranks.stream(f"{self.client}/{step}")),
        )
        moved = torch.zeros(self.options.seeds, dtype=torch.float64)
        for number, coefficient in zip(picked, steps, strict=True):
            moved[number] += coefficient
        self._moved = moved.float()
        return result

    def shared_state(self) -> Payload:
        return Payload(pack(self._moved))


def pack(coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
    """Convert [K] float32 to (seed, scalar) pairs, or return it unchanged if that is shorter."""
    seeds = coefficients.nonzero().flatten()
    if len(seeds) * 6 >= len(coefficients) * 4:
        return {"scalars": coefficients}
    return {"seeds": seeds.to(torch.int16), "scalars": coefficients[seeds]}


def unpack(tensors: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """Invert `pack`: [count] float32. Raises ValueError for tensors that `pack` cannot return."""
    if set(tensors) not in ({"scalars"}, {"seeds", "scalars"}):
        raise ValueError(f"expected seeds and scalars, got {', '.join(sorted(tensors)) or 'nothing'}")
    scalars = tensors["scalars"]
    check_coefficients(scalars)
    if "seeds" not in tensors:
        if len(scalars) != count:
            raise ValueError(f"{len(scalars)} scalars for {count} seeds")
        return scalars
    seeds = tensors["seeds"].long()
    if seeds.shape != scalars.shape or (len(seeds) and not 0 <= int(seeds.min()) <= int(seeds.max()) < count):
        raise ValueError(f"{len(seeds)} seeds for {len(scalars)} scalars, or a seed that is not one of {count}")
    if not bool((seeds[1:] > seeds[:-1]).all()):
        raise ValueError("seeds are not in order, or one is named twice")
    whole = torch.zeros(count, dtype=torch.float32)
    whole[seeds] = scalars
    return whole
