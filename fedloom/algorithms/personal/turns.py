"""Run several trainings of one round on one live buffer, such as the shared model and then a personal one.

Each training ("turn") has its own optimiser, whose state is stored under the turn's name. So `train.optimizer_state`
applies to each turn separately. This file does not know what a turn trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedloom.algorithms.freezing import Frozen
from fedloom.data.batching import Batch
from fedloom.messages.names import under
from fedloom.models.adapters import AdaptedModel
from fedloom.training.trainer import FitResult, Learner, LocalRun


def turn(run: LocalRun, name: str, steps: Sequence[Sequence[Batch]] | None = None, first: int = 0) -> LocalRun:
    """Return the part of `run` that is turn `name`: all steps of the run, or `steps`, which start at its step `first`."""
    kept = under(run.optimizer_state or {}, f"{name}/")
    walk = run.steps if steps is None else lambda: iter(steps)
    return replace(run, steps=walk, first_step=run.first_step + first, optimizer_state=kept or None)


def joined(turns: Mapping[str, FitResult], loss: float) -> FitResult:
    """Combine the turns' results: add up costs, store optimiser states by turn, and report `loss`."""
    return FitResult(
        loss=loss,
        steps=sum(t.steps for t in turns.values()),
        skipped_steps=sum(t.skipped_steps for t in turns.values()),
        tokens=sum(t.tokens for t in turns.values()),
        flops=sum(t.flops for t in turns.values()),
        optimizer_state={f"{name}/{n}": s for name, t in turns.items() for n, s in t.optimizer_state.items()},
    )


class Holding:
    """A learner that keeps a part of the live adapter frozen."""

    def __init__(self, learner: Learner, frozen: Frozen) -> None:
        self.local_loss = learner.local_loss
        self._learner = learner
        self._frozen = frozen

    def before_step(self, model: AdaptedModel) -> None:
        self._learner.before_step(model)
        self._frozen.before_step()

    def after_step(self, model: AdaptedModel) -> None:
        self._learner.after_step(model)
        self._frozen.after_step()


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU, because the live buffer is used for the next client."""
    return {n: t.detach().cpu().clone() for n, t in tensors.items()}
