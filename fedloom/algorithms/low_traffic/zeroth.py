"""Train without gradients: the loss at two points along a random direction gives the step along it.

    ĝ = (L(w + εz) − L(w − εz)) / 2ε,   w ← w − η · mean over the step's directions of ĝ z

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333 (MeZO), Definition 1; with z
standard normal, E[ĝ z] is the gradient of a loss that is quadratic along z, and approximates it for other losses. It
needs only forward passes and no optimiser: of the recipe's `train` section only the learning rate, its schedule, `clip`
and `loss_chunk` have an effect. ĝ² is on average the squared norm of the gradient, so `clip` bounds |ĝ|. Both points have
the same dropout. If a client has several ranks, each computes the losses of its own examples, and one number per point
is summed over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from fedloom.common.errors import ClientFailed, UserError
from fedloom.data.batching import Batch
from fedloom.models.adapters import AdaptedModel
from fedloom.models.recompute import save_memory
from fedloom.recipe.recipe import TrainConfig
from fedloom.training.flops import Flops, flops_of
from fedloom.training.trainer import FitResult, Learner, LocalRun


def check_compile(name: str, train: TrainConfig) -> None:
    """Reject `train.compile`, which needs a backward pass. Raises UserError."""
    if train.compile:
        raise UserError(
            f"train.compile cannot be used with {name}, which trains without a backward pass: set train.compile=false"
        )


def two_point(model: AdaptedModel, z: torch.Tensor, loss: Callable[[], float], epsilon: float) -> tuple[float, float]:
    """Return (ĝ, the mean of both losses) along z: [numel]. The live buffer is restored bit for bit."""
    live = model.adapter.flat
    start = live.clone()
    torch.add(start, z, alpha=epsilon, out=live)
    above = loss()
    torch.add(start, z, alpha=-epsilon, out=live)
    below = loss()
    live.copy_(start)
    return (above - below) / (2 * epsilon), (above + below) / 2


def descend(
    run: LocalRun,
    learner: Learner,
    draw: Callable[[int], Iterable[torch.Tensor]],
    *,
    directions: int,
    epsilon: float,
    dropout: Callable[[int], AbstractContextManager[None]],
) -> tuple[FitResult, list[float]]:
    """Run zeroth-order SGD on the live adapter over this round's steps.

    Args:
        draw: step → its directions, each [numel] on the CPU; drawn one at a time.
        directions: number of directions in a step.
        dropout: step → a context that makes its forward passes repeatable.

    Returns:
        The result, and the coefficient a = η ĝ / directions of each direction, step by step, rounded to float32: a step is
        w ← w − Σ a z. The coefficients of a skipped step are 0. The result's loss is the mean over both points; tokens and
        operations count every forward pass.
    """
    model, flops, result = run.model, flops_of(run.model), FitResult()
    coefficients: list[float] = []
    weighted, weight = 0.0, 0
    model.module.train()
    try:
        for number, batches in enumerate(run.steps()):
            tokens = sum(b.units for b in batches)
            loss = _Loss(run, learner, batches, max(1, tokens), flops, result, partial(dropout, number))
            move = torch.zeros_like(model.adapter.flat)
            taken, values = [], []
            for z in draw(number):
                z = z.to(move.device)
                slope, value = two_point(model, z, loss, epsilon)
                taken.append(_rounded(run.learning_rate(number) * _clipped(slope, run.config.clip) / directions))
                values.append(value)
                move.add_(z, alpha=taken[-1])
            if not all(math.isfinite(a) and math.isfinite(v) for a, v in zip(taken, values, strict=True)):
                _skip_or_fail(run, number, batches)
                result.skipped_steps += 1
                coefficients += [0.0] * directions
                continue
            model.adapter.flat.sub_(move)
            coefficients += taken
            weighted, weight = weighted + sum(values) / directions * tokens, weight + tokens
            result.steps += 1
    finally:
        model.module.eval()
    result.loss = weighted / weight if weight else math.nan
    result.tokens, result.flops = run.ranks.counts(result.tokens, result.flops)
    return result, coefficients


class _Loss:
    """Computes one step's loss at the live buffer, with AdaLoRA's penalty; counts tokens and operations."""

    def __init__(
        self,
        run: LocalRun,
        learner: Learner,
        batches: Sequence[Batch],
        step_units: int,
        flops: Flops,
        result: FitResult,
        dropout: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model, self._ranks, self._batches = run.model, run.ranks, run.ranks.own(batches)
        self._learner, self._step_units = learner, step_units
        self._flops, self._result, self._dropout, self._chunk = flops, result, dropout, run.config.loss_chunk

    @torch.no_grad()
    def __call__(self) -> float:
        total = 0.0
        with self._dropout(), save_memory(self._model, recompute=False, chunk=self._chunk):
            for batch in self._batches:
                total += float(self._learner.local_loss(self._model, batch, self._step_units))
                self._result.tokens += batch.tokens
                self._result.flops += self._flops.forward(batch)
        penalty = self._model.penalty()
        return self._ranks.total(total) + (0.0 if penalty is None else float(penalty))


def _clipped(slope: float, clip: float | None) -> float:
    return slope if clip is None or not abs(slope) > clip else math.copysign(clip, slope)


def _rounded(value: float) -> float:
    """Round to float32, the precision in which it travels."""
    return float(torch.tensor(value, dtype=torch.float32))


def _skip_or_fail(run: LocalRun, number: int, batches: Sequence[Batch]) -> None:
    if run.config.nonfinite == "fail":
        examples = [i for b in batches for i in b.examples]
        raise ClientFailed(
            "non_finite",
            f"a loss of step {number + 1} is not finite (examples {examples[:16]}): "
            "lower train.lr, or set train.nonfinite=skip",
        )
