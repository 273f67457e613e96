"""DeComFL: clients and server exchange lists of scalars; the seeds are shared and do not travel.

Li et al., "Achieving Dimension-Free Communication in Federated Learning via Zeroth-Order Optimization", arXiv
2405.15861. In round r every client takes the same number of zeroth-order steps along the same directions z_rkp
(directions.py; step k, perturbation p) from the same w_r, and sends its step lengths η ĝ. The server averages them,

    w_{r+1} = w_r − Σ_{k,p} ( Σ_i p_i a_ikp ) z_rkp

and everyone replays this. A client that missed rounds receives their scalars and replays them first, to the same bits
(history.py). Traffic: 4 bytes for each step and perturbation, up for this round and down for each missed round. Here the
estimates are two-sided (zeroth.py; the paper's are one-sided), and clients are weighted by their examples. A client that
takes fewer steps than others adds nothing along the remaining directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import NUMBER, About, Sizes
from fedloom.algorithms.low_traffic.directions import Direction
from fedloom.algorithms.low_traffic.history import Replayed, listed
from fedloom.algorithms.low_traffic.zeroth import check_compile, descend
from fedloom.common.randomness import fork_torch
from fedloom.messages.types import Payload, Update
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.trainer import FitResult, LocalRun


def _scalars(sizes: Sizes) -> int:
    perturbations: int = sizes.options.perturbations
    return NUMBER * sizes.steps * perturbations


class DeComFL(Replayed):
    properties: ClassVar = base.Properties(parallel=base.ANY_PARALLEL, cohorts=False)
    about: ClassVar = About(
        "low-traffic",
        "scalars of missed rounds",
        "Li et al. 2024, arXiv 2405.15861",
        up=_scalars,
        down=lambda s: listed(_scalars(s), min(1, s.round - 1)),
        server=lambda s: listed(_scalars(s), s.round),
        client=lambda s: listed(_scalars(s), s.round - 1),
    )

    class Options(base.AlgorithmOptions):
        epsilon: float = Field(1e-3, gt=0, description="ε: how far from the weights the two losses are taken")
        perturbations: int = Field(1, ge=1, description="P: directions in a step; each costs two forward passes")

    options: Options

    @classmethod
    def check(cls, options: Any, adapter: AdapterConfig, train: TrainConfig, model: ModelConfig) -> None:
        super().check(options, adapter, train, model)
        check_compile("decomfl", train)

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = self.mean(updates)
        self.history.rounds.append(mean)
        return {"coefficients": len(mean), "largest_coefficient": float(mean.abs().max())}

    def local_training(self, run: LocalRun) -> FitResult:
        count = self.options.perturbations

        def draw(step: int) -> Iterator[torch.Tensor]:
            for number in range(step * count, (step + 1) * count):
                yield self.space.dense(Direction(self.round, number))

        dropout = partial(fork_torch, self.seed, "dropout", self.round)
        result, steps = descend(
            run,
            self,
            draw,
            directions=count,
            epsilon=self.options.epsilon,
            dropout=lambda step: dropout(run.ranks.stream(f"{self.client}/{step}")),
        )
        self._sent = torch.tensor(steps, dtype=torch.float32)
        return result

    def shared_state(self) -> Payload:
        return Payload({"scalars": self._sent})
