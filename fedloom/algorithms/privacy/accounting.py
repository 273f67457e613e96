"""Compute the privacy that a run spent: a ledger of releases, and the ε of all of them together at a given δ.

A release adds Gaussian noise of z times what one client can change (its L2 sensitivity). The client took part with
probability q, independently of all others and in secret (Poisson sampling), or certainly (q = 1). Releases compose
adaptively, because z and q do not depend on any client's data.

With q = 1 throughout, n Gaussians compose to one: 1/z² = Σ 1/z_i², and its ε is exact (Balle and Wang, "Improving the
Gaussian Mechanism for Differential Privacy", arXiv 1805.06530, Theorem 8). With sampling, ε comes from the privacy
loss distribution for adding or removing a client. Its discretisation is rounded so that ε is never too small. The library
dp-accounting computes both. This file does not know what was released.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from fedloom.common.errors import UserError

#: The range of noise that `noise_for` searches: less noise hardly protects anybody, more noise destroys the model.
LEAST_NOISE, MOST_NOISE = 0.1, 1e6


def library() -> Any:
    """Import dp-accounting. Raises UserError if it is not installed."""
    try:
        import dp_accounting
        import dp_accounting.pld  # not imported by the package itself
    except ImportError:
        raise UserError(
            'privacy needs dp-accounting to compute what is spent: pip install "fedloom[privacy]", or set privacy=null'
        ) from None
    return dp_accounting


class Ledger:
    """Releases in order; equal ones that follow each other are one entry.

    Attributes:
        entries: (count, z, q) of each.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[int, float, float]] = []

    def add(self, noise: float, rate: float = 1.0, count: int = 1) -> None:
        """Add `count` releases with noise z and sampling rate q."""
        if count < 1:
            return
        if self.entries and self.entries[-1][1:] == (noise, rate):
            count += self.entries.pop()[0]
        self.entries.append((count, noise, rate))

    @property
    def releases(self) -> int:
        """Number of releases."""
        return sum(count for count, *_ in self.entries)

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta` of all releases together; infinite if one had no noise."""
        return _epsilon(tuple(self.entries), delta)

    def tensor(self) -> torch.Tensor:
        """[entries, 3] float64, for a checkpoint."""
        return torch.tensor(self.entries, dtype=torch.float64).reshape(-1, 3)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Ledger:
        """Read a ledger from `tensor`."""
        ledger = cls()
        ledger.entries = [(int(count), noise, rate) for count, noise, rate in tensor.tolist()]
        return ledger


@cache
def _epsilon(entries: tuple[tuple[int, float, float], ...], delta: float) -> float:
    if not entries:
        return 0.0
    if any(noise == 0 for _, noise, _ in entries):
        return math.inf
    dp = library()
    if all(rate == 1 for *_, rate in entries):
        together = sum(count / noise**2 for count, noise, _ in entries) ** -0.5
        return float(dp.get_epsilon_gaussian(together, delta))
    # Little noise has a wide distribution. Coarser steps keep it small, and can only make ε larger.
    step = 1e-4 if min(noise for _, noise, _ in entries) >= 0.5 else 1e-3
    accountant = dp.pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, step)
    for count, noise, rate in entries:
        gaussian = dp.GaussianDpEvent(noise)
        accountant.compose(gaussian if rate == 1 else dp.PoissonSampledDpEvent(rate, gaussian), count)
    return float(accountant.get_epsilon(delta))


def spent(noise: float, rounds: int, rate: float, delta: float) -> float:
    """Return ε of `rounds` equal releases."""
    ledger = Ledger()
    ledger.add(noise, rate, rounds)
    return ledger.epsilon(delta)


def noise_for(epsilon: float, delta: float, rounds: int, rate: float) -> float:
    """Find the smallest z (four digits, rounded up) that keeps `rounds` releases within `epsilon`. Raises UserError."""
    library()  # which brings scipy
    from scipy.optimize import brentq

    def excess(logarithm: float) -> float:
        return math.log(max(spent(math.exp(logarithm), rounds, rate, delta), 1e-12) / epsilon)

    low, high = math.log(LEAST_NOISE), 0.0
    while excess(high) > 0:
        low, high = high, high + math.log(4)
        if high > math.log(MOST_NOISE):
            raise UserError(
                f"privacy.epsilon={epsilon:g} with δ={delta:g} over {rounds} rounds cannot be kept with any useful "
                "noise: set a larger privacy.epsilon, or fewer federation.rounds"
            )
    if low == math.log(LEAST_NOISE) and excess(low) <= 0:
        return LEAST_NOISE
    noise = math.exp(brentq(excess, low, high, xtol=1e-6))
    digit = 10.0 ** (math.floor(math.log10(noise)) - 3)
    steps = math.ceil(noise / digit)
    while spent(steps * digit, rounds, rate, delta) > epsilon:
        steps += 1
    return float(f"{steps * digit:.4g}")
