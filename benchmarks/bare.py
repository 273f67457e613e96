"""The bare training loop that the simulator is measured against: the trainer's own step, and nothing around it.

Imported by the other scripts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedloom.recipe.recipe import TrainConfig

import torch  # isort: skip

from fedloom.data.batching import Batch
from fedloom.models.adapters import AdaptedModel
from fedloom.training.objectives import unit_losses
from fedloom.training.trainer import Stepper


class Plain:
    """A learner without an algorithm: the mean loss of the step's tokens."""

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor:
        return unit_losses(model, batch).sum() / step_units

    def before_step(self, model: AdaptedModel) -> None: ...

    def after_step(self, model: AdaptedModel) -> None: ...


def bare(
    model: AdaptedModel, config: TrainConfig, clients: Sequence[Sequence[Sequence[Batch]]], busy: float = 0.0
) -> float:
    """CPU seconds of training on each client's steps, from the adapter as it stands.

    Args:
        clients: client → step → forward passes.
        busy: the share of each step's time that is burnt after it.
    """
    model.module.train()
    began = time.process_time()
    for steps in clients:
        stepper = Stepper(model, Plain(), config)
        for number, batches in enumerate(steps):
            started = time.process_time()
            stepper.step(number, batches, config.lr)
            until = (1 + busy) * (time.process_time() - started) + started
            while time.process_time() < until:
                pass
    return time.process_time() - began
