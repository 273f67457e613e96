"""The gradient noise scale of local training: about how many examples in a step still pay off.

McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1. A gradient estimated from
B examples has E|G_B|² = |G|² + tr(Σ)/B (equation A.1), so the squared norms at two sizes give both terms (A.2, A.3):

    |G|²  = (B_big |G_big|² − B_small |G_small|²) / (B_big − B_small)
    tr(Σ) = (|G_small|² − |G_big|²) / (1/B_small − 1/B_big)
    B_simple = tr(Σ) / |G|²

The small gradients are those of a step's forward passes, whose mean squared norm is taken, the big one is the step's: so
accumulation is needed and no pass is computed twice. Each of the two terms is noisy: as the paper says, it is they that are
averaged over steps (here with decay `decay`, bias-corrected), and their ratio is reported. A client keeps its averages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from fedloom.common.errors import UserError
from fedloom.data.corpus import Partition
from fedloom.federation.hooks.base import Fit, Hook, HookOptions, Pass, Step
from fedloom.recipe.recipe import Recipe

if TYPE_CHECKING:
    from fedloom.algorithms.base import Algorithm


def two_terms(small: list[tuple[float, int]], big: tuple[float, int]) -> tuple[float, float]:
    """(|G|², tr Σ) from (squared norm, examples) of each pass and of the whole step, unbiased."""
    squared = sum(s for s, _ in small) / len(small)
    inverse = sum(1 / b for _, b in small) / len(small)  # 1/B_small; passes may differ in size
    noise = (squared - big[0]) / (inverse - 1 / big[1])
    return big[0] - noise / big[1], noise


class GradientNoise(Hook):
    """Kept: `signal` and `noise`, decayed sums of the two terms, and `steps`, how many of them."""

    class Options(HookOptions):
        decay: float = Field(0.95, ge=0, lt=1, description="of the averages over steps: 1/(1−decay) steps count")

    options: Options
    tells_of_data: ClassVar = True

    def check(self, recipe: Recipe, algorithm: Algorithm, clients: Partition) -> None:
        if recipe.train.accumulation < 2:
            raise UserError(
                "the hook gradient_noise compares a step's forward passes with each other, and train.accumulation=1 makes "
                "one of a step: set train.accumulation=2 and halve train.batch_size, which takes the same examples"
            )

    def batch_start(self, at: Pass) -> None:
        if at.batch is at.step.batches[0]:
            self._so_far: torch.Tensor | None = None
            self._small: list[tuple[float, int]] = []

    def after_backward(self, at: Pass) -> None:
        """A pass counts by its share of the step's units; its own mean gradient is what is measured."""
        grad = at.step.model.grad
        own = grad if self._so_far is None else grad - self._so_far
        self._so_far = grad.clone()
        units = sum(b.units for b in at.step.batches)
        norm = float(own.norm()) * units / max(1, at.batch.units)
        self._small.append((norm * norm, len(at.batch.examples)))

    def before_step(self, at: Step) -> None:
        if len(self._small) < 2 or self._so_far is None:  # the last step of an epoch may have one pass
            return
        norm = float(self._so_far.norm())  # without what an algorithm or a penalty adds
        examples = sum(b for _, b in self._small)
        signal, noise = two_terms(self._small, (norm * norm, examples))
        if not (math.isfinite(signal) and math.isfinite(noise)):
            return
        d, kept = self.options.decay, self.kept.meta
        self.kept.meta = {
            "signal": d * kept.get("signal", 0.0) + (1 - d) * signal,
            "noise": d * kept.get("noise", 0.0) + (1 - d) * noise,
            "steps": kept.get("steps", 0) + 1,
        }

    def fit_end(self, at: Fit) -> None:
        self._so_far = None
        if not self.kept.meta:
            return
        weight = 1 - self.options.decay ** int(self.kept.meta["steps"])
        signal, noise = self.kept.meta["signal"] / weight, self.kept.meta["noise"] / weight
        self.numbers = {"signal": signal, "noise": noise}
        if signal > 0 and noise > 0:  # else the noise hides the gradient, and the ratio says nothing
            self.numbers["scale"] = noise / signal
