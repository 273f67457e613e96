"""The geometric median: the point with the smallest sum of distances to the clients' adapters.

Pillutla et al., "Robust Aggregation for Federated Learning", arXiv 1912.13445, Algorithm 2, the smoothed Weiszfeld
iteration: β_k = 1 / max(ν, ‖z − θ_k‖), z ← Σ β_k θ_k / Σ β_k. It is robust while fewer than half of the clients are
hostile. Unlike in the paper, all clients have the same weight (see coordinatewise.py), and z starts at the coordinate-wise
median, so a client that is 1e6 times too large costs no iterations. All updates are in memory at once. The whole adapter
travels, both ways.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.robust import coordinatewise as robust
from fedloom.algorithms.robust.krum import distance


class GeometricMedian(robust.HoldsAll):
    about: ClassVar = About("robust", "adapter, both ways", "Pillutla et al. 2019, arXiv 1912.13445")

    class Options(base.AlgorithmOptions):
        tolerance: float = Field(
            1e-4,
            gt=0,
            description="stop once the point moves by less than this share of its median distance to a client",
        )
        iterations: int = Field(100, ge=1, description="stop after this many iterations in any case")
        smoothing: float = Field(1e-6, gt=0, description="ν: smaller distances are raised to it")

    options: Options

    def combine(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, float]]:
        point, iterations = robust.median(rows).double(), 0
        for _ in range(self.options.iterations):
            distances = [distance(point, row) for row in rows]
            weights = [1 / max(self.options.smoothing, d) for d in distances]
            after = torch.zeros_like(point)
            for row, weight in zip(rows, weights, strict=True):
                after.add_(row.double(), alpha=weight / sum(weights))
            iterations += 1
            moved, point = distance(point, after), after
            if moved <= self.options.tolerance * statistics.median(distances):
                break
        return point.float(), {"iterations": iterations}
