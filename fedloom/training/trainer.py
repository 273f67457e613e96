"""One client's local training in one round: an optimiser, a schedule over the whole run, and a loop over steps.

The trainer is blind to the algorithm: it calls the three places where an algorithm may act (`local_loss`,
`before_step`, `after_step`) and knows neither rounds' payloads nor other clients. The loss of a step is the sum of
its token losses over its supervised tokens, all accumulation and all ranks (parallel.py) together.
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
    """What the trainer needs of an algorithm's client half."""

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor: ...

    def before_step(self, model: AdaptedModel) -> None: ...

    def after_step(self, model: AdaptedModel) -> None: ...


@dataclass
class FitResult:
    """What a client's training was.

    Attributes:
        loss: mean of the steps' losses, each weighted by its supervised tokens.
        steps: optimiser steps taken; skipped ones are not among them.
        tokens: real tokens that went through forward and backward, on all ranks.
        flops: of those.
        optimizer_state: name → tensor, enough to carry on exactly.
    """

    loss: float = 0.0
    steps: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    flops: int = 0
    optimizer_state: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalRun:
    """One client-round's training, as an algorithm's client half is given it.

    Most algorithms call `fit` once. One that trains two models calls it twice, one that trains other numbers than the
    adapter's gives `fit` its own parameter, one that takes no gradients walks over `steps` itself, and shares what it
    computes with the other ranks itself.

    Attributes:
        steps: makes a fresh walk over this round's optimiser steps, each a list of forward passes: all ranks' passes, of
            which `ranks.own` has this one's.
        first_step, total_steps: where the round stands in the run, for schedules.
        optimizer_state: of the client's last round, where the recipe keeps it.
        steps_per_epoch: None where the client counts steps.
        hooks: the recipe's, called within `fit`.
        ranks: this process's place among those that train this client.
    """

    model: AdaptedModel
    steps: Callable[[], Iterator[Sequence[Batch]]]
    config: TrainConfig
    first_step: int
    total_steps: int
    optimizer_state: Mapping[str, torch.Tensor] | None = None
    steps_per_epoch: int | None = None
    hooks: Hooks | None = None
    ranks: Ranks = ALONE

    def fit(self, learner: Learner, parameter: torch.nn.Parameter | None = None) -> FitResult:
        """Plain local training of the live adapter, or of `parameter`, with `learner`'s loss and hooks."""
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
            hooks=self.hooks.fit(self.model, grad, self.steps_per_epoch) if self.hooks else None,
            ranks=self.ranks,
        )

    def learning_rate(self, step: int) -> float:
        """Of this round's optimiser step `step` (from 0)."""
        return learning_rate(self.config, self.first_step + step, self.total_steps)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of optimiser step `step` (from 0) of `total`.

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
        first_step: how many optimiser steps of the run lie before this round, for the schedule.
        total_steps: optimiser steps of the whole run.
        optimizer_state: from an earlier `FitResult`, to go on from it.
        parameter: what the optimiser steps in place of the adapter, with a gradient of its own: `before_step` fills
            that in from `model.grad`, `after_step` puts the new values into the model.
        hooks: what acts at the points within; None costs nothing.
        ranks: who takes which passes of a step; what comes after the sum of their gradients, each does alike.

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
    """Takes one optimiser step after another: all of a step's work is in `step`, and what is not, `fit` adds.

    The model is in training mode around it. Arguments as `fit` has them.
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
        """Step `number` (from 0) over `batches`, its forward passes, at the learning rate `rate`. Raises as `fit` does."""
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
        """What the steps so far add up to, over all ranks."""
        result = self._result
        result.loss = self._weighted / self._weight if self._weight else math.nan
        if self.ranks.count > 1:
            result.tokens, result.flops = self.ranks.counts(result.tokens, result.flops)
        result.optimizer_state = self.optimizer.tensors()
        return result


def _clipped(
    parameter: torch.nn.Parameter, loss: float, config: TrainConfig, number: int, batches: Sequence[Batch]
) -> bool:
    """Whether this step can be taken; its gradient has the recipe's norm then at most. Raises as `fit` does."""
    gradient = parameter.grad
    assert gradient is not None
    norm = float(gradient.norm())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        _skip_or_fail(config, number, batches, "loss" if not math.isfinite(loss) else "gradient")
        return False
    if config.clip is not None and norm > config.clip:
        gradient.mul_(config.clip / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
    return True


def passes(model: AdaptedModel, config: TrainConfig) -> AbstractContextManager[None]:
    """In this block passes are the recipe's: what they keep, what is compiled, and their precision; `backward` ends them."""
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
    """One step's gradient in `model.grad`, in the recipe's precision, computed again where the scale was too large.

    Returns the step's loss.
    """
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
    """Forward and backward over one step's batches; the gradient, times the scale, stands in `model.grad`.

    Each rank goes over its own batches, dividing by the units of all; the sum over ranks is the step's. Returns the step's
    loss.
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
            model.grad.mul_(1.0 / factor)  # hooks see it as it is; powers of two go out and in exactly
            hooks.backward()
            model.grad.mul_(factor)
        total += float(loss.detach())
        result.tokens += batch.tokens
        result.flops += flops.of(batch)
    if ranks.count > 1:
        ranks.sum_(model.grad)
        total = ranks.total(total)
    if model.orthogonality and (penalty := model.penalty()) is not None:  # AdaLoRA's; not part of the loss reported
        backward(model, penalty, scale)  # every rank has all of it
    return total


def backward(model: AdaptedModel, loss: torch.Tensor, scale: LossScale | None) -> None:
    """Add the gradient of `loss` times the scale to `model.grad`; within `passes`."""
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
