"""FedMeZO: clients train without gradients, by two forward passes a step, and the server averages their adapters.

Ling et al., "On the Convergence of Zeroth-Order Federated Tuning for Large Language Models", arXiv 2402.05926: local
steps of MeZO (the estimate is in zeroth.py), then FedAvg. A client needs the memory of inference and a few copies of the
adapter. The adapter travels both ways, as in FedAvg. Each client draws its own directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.averaging import fedavg
from fedloom.algorithms.low_traffic.directions import Direction, Directions
from fedloom.algorithms.low_traffic.zeroth import check_compile, descend
from fedloom.common.randomness import derive_seed, fork_torch
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.trainer import FitResult, LocalRun


class FedMeZO(fedavg.FedAvg):
    properties: ClassVar = base.Properties(linear_sum=True, parallel=base.ANY_PARALLEL, cohorts=False)
    about: ClassVar = About("low-traffic", "adapter, both ways", "Ling et al. 2024, arXiv 2402.05926")

    class Options(fedavg.FedAvg.Options):
        epsilon: float = Field(1e-3, gt=0, description="ε: how far from the weights the two losses are taken")
        perturbations: int = Field(1, ge=1, description="directions in a step; each costs two forward passes")

    options: Options

    @classmethod
    def check(cls, options: Any, adapter: AdapterConfig, train: TrainConfig, model: ModelConfig) -> None:
        super().check(options, adapter, train, model)
        check_compile("fedmezo", train)

    def local_training(self, run: LocalRun) -> FitResult:
        own = derive_seed(self.seed, "seeds", self.round, self.client)
        directions = Directions(own, run.model.adapter.layout.numel)
        count = self.options.perturbations

        def draw(step: int) -> Iterator[torch.Tensor]:
            for number in range(step * count, (step + 1) * count):
                yield directions.dense(Direction(self.round, number))

        dropout = partial(fork_torch, self.seed, "dropout", self.round)
        result, _ = descend(
            run,
            self,
            draw,
            directions=count,
            epsilon=self.options.epsilon,
            dropout=lambda step: dropout(run.ranks.stream(f"{self.client}/{step}")),
        )
        return result
