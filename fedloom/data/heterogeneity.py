"""Measure how different clients are, as two numbers between 0 (all equal) and 1.

    categories  the mean Jensen-Shannon distance between a client's distribution over categories and that of all data,
                weighted by the clients' sizes (Lin 1991, IEEE Transactions on Information Theory 37(1); logarithms to
                base 2, the square root, so that it is a distance)
    sizes       the Gini coefficient of the number of examples: 0 if all clients are equal, near 1 if one has all

This file knows counts, not where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Counts = Sequence[Mapping[str, int]]


class Heterogeneity(TypedDict):
    """How different clients are, from 0 to 1; `categories` is None with fewer than two categories."""

    categories: float | None
    sizes: float


def heterogeneity(counts: Counts) -> Heterogeneity:
    """Compute both numbers from each client's category → number of examples.

    `categories` is None with fewer than two categories.
    """
    sizes = np.array([sum(row.values()) for row in counts], dtype=float)
    names = sorted({name for row in counts for name in row})
    distance = None
    if len(names) > 1 and sizes.sum() > 0:
        total = np.array([sum(row.get(name, 0) for row in counts) for name in names], dtype=float)
        pooled = total / total.sum()
        place = {name: k for k, name in enumerate(names)}
        distance = float(
            sum(
                size / sizes.sum() * _distance(row, place, pooled)
                for size, row in zip(sizes, counts, strict=True)
                if size
            )
        )
    return {"categories": distance, "sizes": gini(sizes)}


def _distance(row: Mapping[str, int], place: Mapping[str, int], pooled: NDArray[np.float64]) -> float:
    own = np.zeros_like(pooled)
    for name, count in row.items():
        own[place[name]] = count
    return jensen_shannon(own / own.sum(), pooled)


def jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Return the distance between two distributions [n]: √(½ KL(p‖m) + ½ KL(q‖m)) with m = (p + q)/2, to base 2."""
    m = (p + q) / 2
    halves = [float(np.sum(a[a > 0] * np.log2(a[a > 0] / m[a > 0]))) / 2 for a in (p, q)]
    return float(np.sqrt(max(0.0, sum(halves))))


def gini(sizes: NDArray[np.float64]) -> float:
    """Return Σ_i Σ_j |s_i − s_j| / (2 n Σ s), by sorting."""
    ordered = np.sort(sizes)
    n, total = len(ordered), float(ordered.sum())
    if n == 0 or total == 0:
        return 0.0
    ranks = np.arange(1, n + 1)
    return float((2 * ranks - n - 1) @ ordered / (n * total))


def describe_difference(found: Heterogeneity | None) -> str:
    """Describe in words how different clients are; "" if a run folder does not have the numbers."""
    if not found:
        return ""
    categories = found["categories"]
    of_categories = "" if categories is None else f"{categories:.2f} in categories, "
    return f"how different clients are, 0 equal to 1: {of_categories}{found['sizes']:.2f} in size"
