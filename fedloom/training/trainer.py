"""Local training of one client in one round: an optimiser, a schedule over the whole run, and a loop over steps.

The trainer does not know the algorithm: it calls its three hooks (`local_loss`, `before_step`, `after_step`). It does not
know payloads or other clients either. The loss of a step is the sum of its token losses divided by its supervised tokens,
over all accumulation and all ranks (parallel.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from fedloom.common.errors import ClientFailed
from fedloom.data.batching import Batch
from fedloom.models.adapters import AdaptedModel
from fedloom.models.recompute import save_memory
from fedloom.recipe.recipe import TrainConfig
from fedloom.training.compiling import compiled
from fedloom.training.flops import Flops, flops_of
from fedloom.training.optimizer import FlatOptimizer
from fedloom.training.parallel import ALONE, Ranks
from fedloom.training.precision import LossScale, autocast

if TYPE_CHECKING:
    from fedloom.federation.hooks.calls import FitHooks, Hooks


class Learner(Protocol):
    """The methods of an algorithm's client half that the trainer calls."""

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor: ...

    def before_step(self, model: AdaptedModel) -> None: ...

    def after_step(self, model: AdaptedModel) -> None: ...


@dataclass
class FitResult:
    """The result of a client's training.

    Attributes:
        loss: mean of the steps' losses, each weighted by its supervised tokens.
        steps: optimiser steps taken, without skipped ones.
        tokens: real tokens that went through forward and backward, on all ranks.
        flops: floating-point operations of these tokens.
        optimizer_state: name → tensor, enough to continue exactly.
    """

    loss: float = 0.0
    steps: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    flops: int = 0
    optimizer_state: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalRun:
    """One client's training in one round, as an algorithm's client half gets it.

    Most algorithms call `fit` once. One that trains two models calls it twice. One that trains other numbers than the
    adapter's passes its own parameter to `fit`. One without gradients iterates over `steps` itself, and exchanges its
    results with the other ranks itself.

    Attributes:
        steps: starts an iteration over this round's optimiser steps. Each is a list of all ranks' forward passes;
            `ranks.own` selects this rank's.
        first_step, total_steps: the round's first optimiser step in the run and the run's number of steps, for schedules.
        optimizer_state: of the client's last round, where the recipe keeps it.
        hooks: the recipe's, called within `fit`.
        ranks: this process's place among those that train this client.
    """

    model: AdaptedModel
    steps: Callable[[], Iterator[Sequence[Batch]]]
    config: TrainConfig
    first_step: int
    total_steps: int
    optimizer_state: Mapping[str, torch.Tensor] | None = None
    hooks: Hooks | None = None
    ranks: Ranks = ALONE

    def fit(self, learner: Learner, parameter: torch.nn.Parameter | None = None) -> FitResult:
        """Train the live adapter, or `parameter`, with `learner`'s loss and hooks."""
        grad = (self.model.parameter if parameter is None else parameter).grad
        assert grad is not None
        return fit(
            self.model,
            learner,
            self.steps(),
            self.config,
            first_step=self.first_step,
            total_steps=self.total_steps,
            optimizer_state=self.optimizer_state,
            parameter=parameter,
            hooks=self.hooks.fit(self.model, grad) if self.hooks else None,
            ranks=self.ranks,
        )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of this round's optimiser step `step` (from 0)."""
        return learning_rate(self.config, self.first_step + step, self.total_steps)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Return the learning rate of optimiser step `step` (from 0) of `total`.

    Warm-up rises linearly over the first `warmup · total` steps; then constant, linear to 0, or half a cosine to 0.
    """
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def fit(
    model: AdaptedModel,
    learner: Learner,
    steps: Iterable[Sequence[Batch]],
    config: TrainConfig,
    *,
    first_step: int,
    total_steps: int,
    optimizer_state: Mapping[str, torch.Tensor] | None = None,
    parameter: torch.nn.Parameter | None = None,
    hooks: FitHooks | None = None,
    ranks: Ranks = ALONE,
) -> FitResult:
    """Train the live adapter over `steps`, each a list of forward passes.

    Args:
        first_step: the number of optimiser steps of the run before this round, for the schedule.
        total_steps: optimiser steps of the whole run.
        optimizer_state: from an earlier `FitResult`, to continue from it.
        parameter: what the optimiser steps instead of the adapter, with its own gradient. `before_step` must compute that
            gradient from `model.grad`; `after_step` must put the new values into the model.
        hooks: called at their points in training; None costs nothing.
        ranks: this process's place among the ranks. Each rank takes its own passes of a step; after the sum of their
            gradients, all do the same.

    Raises:
        ClientFailed: ``non_finite``, naming the step and its examples, where the recipe does not skip.
    """
    stepper = Stepper(
        model, learner, config, optimizer_state=optimizer_state, parameter=parameter, hooks=hooks, ranks=ranks
    )
    model.module.train()
    try:
        for number, batches in enumerate(steps):
            stepper.step(number, batches, learning_rate(config, first_step + number, total_steps))
        if hooks:
            hooks.end()
    finally:
        model.module.eval()
        model.grad.zero_()
    return stepper.finished()


class Stepper:
    """Takes optimiser steps one at a time. `fit` adds the loop and the schedule.

    The caller puts the model into training mode. The arguments are those of `fit`.
    """

    def __init__(
        self,
        model: AdaptedModel,
        learner: Learner,
        config: TrainConfig,
        *,
        optimizer_state: Mapping[str, torch.Tensor] | None = None,
        parameter: torch.nn.Parameter | None = None,
        hooks: FitHooks | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.learner, self.config, self.hooks, self.ranks = model, learner, config, hooks, ranks
        self.parameter = model.parameter if parameter is None else parameter
        self.optimizer = FlatOptimizer(config, self.parameter, optimizer_state)
        self._flops = flops_of(model)
        halves = config.precision != "fp32" or model.base.dtype == torch.float16  # what a loss scale may be for
        self._scale = LossScale(config.precision, model.base.dtype) if halves else None
        self._result = FitResult()
        self._weighted, self._weight = 0.0, 0

    def step(self, number: int, batches: Sequence[Batch], rate: float) -> None:
        """Take step `number` (from 0) over `batches`, its forward passes, at the learning rate `rate`. Raises like `fit`."""
        config, hooks, result = self.config, self.hooks, self._result
        if hooks:
            hooks.step(number, batches, rate)
        loss = _gradient(self.model, self.learner, batches, config, result, self._flops, self.ranks, hooks, self._scale)
        self.learner.before_step(self.model)
        if hooks:
            hooks.before_step(loss)
        if not _clipped(self.parameter, loss, config, number, batches):
            result.skipped_steps += 1
            return
        self.optimizer.step(rate)
        self.learner.after_step(self.model)
        if hooks:
            hooks.after_step()
        tokens = sum(b.units for b in batches)
        self._weighted, self._weight = self._weighted + loss * tokens, self._weight + tokens
        result.steps += 1

    def finished(self) -> FitResult:
        """Return the result of the steps so far, over all ranks."""
        result = self._result
        result.loss = self._weighted / self._weight if self._weight else math.nan
        if self.ranks.count > 1:
            result.tokens, result.flops = self.ranks.counts(result.tokens, result.flops)
        result.optimizer_state = self.optimizer.tensors()
        return result


def _clipped(
    parameter: torch.nn.Parameter, loss: float, config: TrainConfig, number: int, batches: Sequence[Batch]
) -> bool:
    """Clip the gradient to the recipe's norm. Returns False where it is not finite and the step is skipped.

    Raises like `fit`.
    """
    gradient = parameter.grad
    assert gradient is not None
    norm = float(gradient.norm())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        _skip_or_fail(config, number, batches, "loss" if not math.isfinite(loss) else "gradient")
        return False
    if config.clip is not None and norm > config.clip:
        gradient.mul_(config.clip / (norm + 1e-6))  # like torch.nn.utils.clip_grad_norm_
    return True


def passes(model: AdaptedModel, config: TrainConfig) -> AbstractContextManager[None]:
    """Within the block, forward passes use the recipe's checkpointing, compiled layers and precision.

    Run the backward pass within it too, by `backward`.
    """
    plain = config.precision == "fp32" and config.loss_chunk is None and not (config.checkpointing or config.compile)
    return nullcontext() if plain else _altered_passes(model, config)


@contextmanager
def _altered_passes(model: AdaptedModel, config: TrainConfig) -> Iterator[None]:
    with (
        save_memory(model, config.checkpointing, config.loss_chunk),
        compiled(model, config.compile),
        autocast(model.device, config.precision),
    ):
        yield


def _gradient(
    model: AdaptedModel,
    learner: Learner,
    batches: Sequence[Batch],
    config: TrainConfig,
    result: FitResult,
    flops: Flops,
    ranks: Ranks,
    hooks: FitHooks | None,
    scale: LossScale | None,
) -> float:
    """Compute one step's gradient into `model.grad`, again where the loss scale was too large. Returns the step's loss."""
    with passes(model, config):
        loss = _accumulate(model, learner, batches, result, flops, ranks, hooks, scale)
        while scale is not None and scale.overflowed(model.grad, loss):
            loss = _accumulate(model, learner, batches, result, flops, ranks, hooks, scale)
    return loss


def _accumulate(
    model: AdaptedModel,
    learner: Learner,
    batches: Sequence[Batch],
    result: FitResult,
    flops: Flops,
    ranks: Ranks = ALONE,
    hooks: FitHooks | None = None,
    scale: LossScale | None = None,
) -> float:
    """Run forward and backward over one step's batches. The gradient, times the scale, is in `model.grad` afterwards.

    Each rank runs its own batches and divides by the units of the whole step; the sum over ranks is the step's gradient.
    Returns the step's loss.
    """
    model.grad.zero_()
    step_units = max(1, sum(b.units for b in batches))
    total = 0.0
    for batch in ranks.own(batches) if ranks.count > 1 else batches:
        if hooks:
            hooks.batch(batch)
        loss = learner.local_loss(model, batch, step_units)
        if hooks:
            loss = hooks.forward(loss)
        backward(model, loss, scale)
        if hooks:
            factor = 1.0 if scale is None else scale.value
            model.grad.mul_(1.0 / factor)  # hooks see the unscaled gradient; powers of two are exact
            hooks.backward()
            model.grad.mul_(factor)
        total += float(loss.detach())
        result.tokens += batch.tokens
        result.flops += flops.of(batch)
    if ranks.count > 1:
        ranks.sum_(model.grad)
        total = ranks.total(total)
    if model.orthogonality and (penalty := model.penalty()) is not None:  # AdaLoRA's; not part of the loss reported
        backward(model, penalty, scale)  # every rank computes the whole penalty
    return total


def backward(model: AdaptedModel, loss: torch.Tensor, scale: LossScale | None) -> None:
    """Add the gradient of `loss` times the scale to `model.grad`. Call it within `passes`."""
    with torch.autocast(loss.device.type, enabled=False):
        model.backward(loss if scale is None or scale.value == 1.0 else loss * scale.value)


def _skip_or_fail(config: TrainConfig, number: int, batches: Sequence[Batch], what: str) -> None:
    if config.nonfinite == "fail":
        examples = [i for b in batches for i in b.examples]
        raise ClientFailed(
            "non_finite",
            f"the {what} of step {number + 1} is not finite (examples {examples[:16]}): "
            "lower train.lr, or set train.nonfinite=skip",
        )
