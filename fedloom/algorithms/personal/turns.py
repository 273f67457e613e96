"""Several trainings in one round on the one live buffer, one after another: a shared model and then a personal one.

Each turn has an optimiser of its own, whose state is kept under the turn's name, so that what the recipe keeps or
resets (`train.optimizer_state`) holds for each apart. This file does not know what a turn trains.
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
    """The part of `run` that is turn `name`: all of its steps, or `steps`, which begin at its step `first`."""
    kept = under(run.optimizer_state or {}, f"{name}/")
    walk = run.steps if steps is None else lambda: iter(steps)
    return replace(run, steps=walk, first_step=run.first_step + first, optimizer_state=kept or None)


def joined(turns: Mapping[str, FitResult], loss: float) -> FitResult:
    """The round's result: costs added up, optimiser states side by side; `loss` is the one to report."""
    return FitResult(
        loss=loss,
        steps=sum(t.steps for t in turns.values()),
        skipped_steps=sum(t.skipped_steps for t in turns.values()),
        tokens=sum(t.tokens for t in turns.values()),
        flops=sum(t.flops for t in turns.values()),
        optimizer_state={f"{name}/{n}": s for name, t in turns.items() for n, s in t.optimizer_state.items()},
    )


class Holding:
    """`learner`, with some of the live adapter frozen meanwhile."""

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
    """Copies on the CPU, to keep: what stands in the live buffer will be another's."""
    return {n: t.detach().cpu().clone() for n, t in tensors.items()}
