"""Krum: take the adapter of the client that is closest to its neighbours; multi-Krum averages the closest few.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", arXiv 1703.02757, section 4:
of n clients, f may be hostile. The score of client i is Σ ‖θ_i − θ_j‖² over its n − f − 2 closest others, and the
smallest score wins. The guarantee needs n > 2f + 2. All clients have the same weight. All updates are in memory at once.
The whole adapter travels, both ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from typing import ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.robust import coordinatewise as robust


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return ‖one − other‖ in fp64, computed in blocks to bound scratch memory.

    A Gram matrix would lose the distances of normal clients to rounding if one client is 1e6 times too large.
    """
    parts = zip(torch.split(one, robust.COLUMNS), torch.split(other, robust.COLUMNS), strict=True)
    return math.sqrt(sum(float((a.double() - b.double()).norm()) ** 2 for a, b in parts))


def ranking(rows: Sequence[torch.Tensor], neighbours: int) -> list[int]:
    """Rank clients by their Krum score, best first.

    With one neighbour, the two clients closest to each other always tie. Then the sum over one more neighbour decides, and
    so on, so that the order of the clients does not matter.
    """
    squares: list[list[float]] = [[] for _ in rows]
    for i, j in combinations(range(len(rows)), 2):
        square = distance(rows[i], rows[j]) ** 2
        squares[i].append(square)
        squares[j].append(square)
    scores = [list(accumulate(sorted(s)))[max(0, neighbours - 1) :] for s in squares]
    return sorted(range(len(rows)), key=scores.__getitem__)


class Krum(robust.HoldsAll):
    properties: ClassVar = base.Properties(streams=False, neutral={})
    about: ClassVar = About("robust", "adapter, both ways", "Blanchard et al. 2017, arXiv 1703.02757")

    class Options(base.AlgorithmOptions):
        hostile: float = Field(
            0.2, ge=0, lt=0.5, description="share of a round's clients that may be hostile (f), rounded up"
        )
        keep: int = Field(1, ge=1, description="how many of the closest are averaged: 1 is Krum, more is multi-Krum")

    options: Options

    def combine(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, float]]:
        clients = len(rows)
        # Of fewer than 2f + 3 clients, only as many as the paper's condition allows can be assumed hostile.
        f = max(0, min(robust.count_of(self.options.hostile, clients), (clients - 3) // 2))
        keep = (
            clients if clients < 3 else min(self.options.keep, clients - f)
        )  # two clients have no nearest one: take their mean
        chosen = ranking(rows, max(1, clients - f - 2))[:keep]
        result = torch.zeros_like(rows[0], dtype=torch.float64)
        for i in sorted(chosen):
            result += rows[i]
        return (result / keep).float(), {"assumed_hostile": f, "kept": keep}
