"""Clip each client's change to norm C, and adapt C to the clients' norms if the recipe says so.

Adaptive clipping is Andrew et al., "Differentially Private Learning with Adaptive Clipping", arXiv 1905.03871. Each
client adds one bit, b_k = 1 where its norm is within C, and the server moves C towards the quantile γ:

    b̃ = ½ + (Σ_k (b_k − ½) + N(0, σ_b²)) / m          C ← C · exp(−η (b̃ − γ))

with m the expected number of clients. b_k − ½ changes the sum by at most ½. So the bits and the vectors together are one
Gaussian release with noise multiplier z if the vectors have z_Δ (Theorem 1):

    z_Δ = (z⁻² − (2σ_b)⁻²)^(−1/2)

This file computes with vectors and numbers. It does not know who sends them, and does not draw the noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedloom.common.errors import UserError
from fedloom.models.layout import block_sum
from fedloom.recipe.privacy import AdaptiveConfig, PrivacyConfig


def norm_of(flat: torch.Tensor) -> float:
    """Return the Euclidean norm of a vector in float64; it does not depend on the number of threads."""
    return math.sqrt(float(block_sum(flat.double().square())))


def clipped(flat: torch.Tensor, bound: float) -> torch.Tensor:
    """Return v · min(1, bound / ‖v‖): [numel] float64."""
    norm = norm_of(flat)
    return flat.double() if norm <= bound else flat.double() * (bound / norm)


def largest_honest(clip: float, deviation: float, numel: int) -> float:
    """Return a norm that C plus Gaussian noise on `numel` numbers exceeds with a probability below 1e-12.

    Laurent and Massart, "Adaptive estimation of a quadratic functional by model selection", Annals of Statistics 28
    (2000), Lemma 1: P(‖N‖² ≥ d + 2√(dt) + 2t) ≤ e^(−t), and the root of the right side is at most √d + √(2t).
    """
    return clip + deviation * (math.sqrt(numel) + math.sqrt(2 * math.log(1e12)))


@dataclass(frozen=True)
class Deviations:
    """How one noise multiplier z is divided. `vector`: z_Δ, in units of C. `count`: σ_b, None if C does not adapt."""

    vector: float
    count: float | None


def count_noise(adaptive: AdaptiveConfig, noise: float, expected: int) -> float:
    """Return σ_b: the recipe's, or m/20 as in the paper, and at least 2z: then z_Δ is at most 3.3 % above z."""
    if adaptive.noise is not None:
        return adaptive.noise
    return max(expected / 20, 2 * noise) if noise else 0.0


def deviations(privacy: PrivacyConfig, expected: int) -> Deviations:
    """Divide the noise between vectors and count. Raises UserError if the count's noise is too small for that."""
    noise = privacy.noise or 0.0
    if privacy.adaptive is None:
        return Deviations(noise, None)
    count = count_noise(privacy.adaptive, noise, expected)
    if noise == 0:
        return Deviations(0.0, count)
    left = noise**-2 - (2 * count) ** -2 if count else -1.0
    if left <= 0:
        raise UserError(
            f"privacy.adaptive.noise={count:g} spends all that privacy.noise={noise:g} allows: "
            f"set it above {noise / 2:g}, such as {2 * noise:g}, which costs little"
        )
    return Deviations(left**-0.5, count)


def moved(clip: float, adaptive: AdaptiveConfig, within: float) -> float:
    """Return C for the next round, if a share `within` of this round's updates was within C."""
    return clip * math.exp(-adaptive.lr * (within - adaptive.quantile))
