"""FedRep: train FedPer's two parts one after the other, first the private part, then the shared part.

Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", arXiv 2102.07078, Algorithm 1:
in a round client k first trains its own part θ_P(k) with the shared θ_B that it received, then θ_B with its new θ_P(k).
Only θ_B travels. The round's steps are divided between the two parts, so a round costs as much as in FedAvg. Each part
has its own optimiser.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.freezing import Frozen
from fedloom.algorithms.personal.fedper import FedPer, private_bytes, shared_bytes
from fedloom.algorithms.personal.turns import Holding, joined, turn
from fedloom.common.errors import ClientFailed, UserError
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.trainer import FitResult, LocalRun


class FedRep(FedPer):
    properties: ClassVar = base.Properties(linear_sum=True, personal=True, parallel=base.ANY_PARALLEL)
    about: ClassVar = About(
        "personalised",
        "shared layers' part",
        "Collins et al. 2021, arXiv 2102.07078",
        up=shared_bytes,
        down=shared_bytes,
        server=shared_bytes,
        client=private_bytes,
    )

    class Options(FedPer.Options):
        private_steps: float = Field(
            0.5, gt=0, lt=1, description="share of a round's steps that train the private part; at least one step each"
        )

    options: Options

    @classmethod
    def check(cls, options: Any, adapter: AdapterConfig, train: TrainConfig, model: ModelConfig) -> None:
        super().check(options, adapter, train, model)
        if train.steps == 1:
            raise UserError("algorithm fedrep trains two parts in turn, but train.steps=1: set at least train.steps=2")

    def local_training(self, run: LocalRun) -> FitResult:
        steps = list(run.steps())
        if len(steps) < 2:
            raise ClientFailed(  # train.epochs: only the client knows how many steps these are
                "too_few_steps",
                "fedrep trains two parts in turn, but this client's epochs are one step: raise train.epochs",
            )
        first = min(max(1, round(self.options.private_steps * len(steps))), len(steps) - 1)
        names = frozenset(run.model.adapter.views)
        turns = {}
        for name, kept, part, start in (
            ("private", names - self.private, steps[:first], 0),
            ("shared", self.private, steps[first:], first),
        ):
            held = Holding(self, Frozen(run.model, sorted(kept)))
            turns[name] = turn(run, name, part, start).fit(held)
        taken = [t for t in turns.values() if t.steps]
        loss = sum(t.loss * t.steps for t in taken) / max(1, sum(t.steps for t in taken))
        return joined(turns, loss)
