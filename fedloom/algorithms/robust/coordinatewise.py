"""Coordinate-wise robust rules: the median, or the trimmed mean, of each number over the clients.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv 1803.01498, Definitions 1
and 2, applied to the clients' adapters. All clients have the same weight: a client reports its number of examples itself,
and a weight that a client can choose breaks every bound. Updates that are not finite are rejected before (`base.accept`).
Such a rule needs all updates of a round at once. The whole adapter travels, both ways.

On LoRA the rules act on A and B as they travel, not on their product.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.messages.types import Update
from fedloom.models.layout import Adapter

#: Columns processed together: bounds the scratch memory of a rule to clients × this many numbers.
COLUMNS = 1 << 20


class HoldsAll(base.Algorithm):
    """Collects a round's updates, in client order, for a rule that cannot stream."""

    properties: ClassVar = base.Properties(streams=False, neutral={})

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        rows = [Adapter.of(update.payload.tensors).flat for update in updates]
        if not rows:
            raise ValueError("there are no updates to aggregate")
        result, metrics = self.combine(rows)
        moved = float((result - self.shared.flat).norm())
        self.shared.copy_(result)
        return {"distance_moved": moved, **metrics}

    @abstractmethod
    def combine(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Combine the clients' adapters ([numel] each) into one; also return metrics to log."""


def coordinatewise(rows: Sequence[torch.Tensor], fold: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply `fold` ([clients, columns] fp64, each column sorted → [columns]) to blocks of columns: [numel] fp32."""
    parts = zip(*(torch.split(row, COLUMNS) for row in rows), strict=True)
    return torch.cat([fold(torch.stack(part).double().sort(dim=0).values).float() for part in parts])


def median(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the median of each number, [numel] fp32; for an even count the mean of the two middle ones."""
    low, high = (len(rows) - 1) // 2, len(rows) // 2
    return coordinatewise(rows, lambda columns: (columns[low] + columns[high]) / 2)


def count_of(share: float, clients: int) -> int:
    """Return the number of clients in a share, rounded up, so that a promised share is always covered."""
    return math.ceil(share * clients - 1e-9)


class Median(HoldsAll):
    about: ClassVar = About("robust", "adapter, both ways", "Yin et al. 2018, arXiv 1803.01498")

    def combine(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, float]]:
        return median(rows), {}


class TrimmedMean(HoldsAll):
    about: ClassVar = About("robust", "adapter, both ways", "Yin et al. 2018, arXiv 1803.01498")

    class Options(base.AlgorithmOptions):
        trim: float = Field(
            0.2,
            ge=0,
            lt=0.5,
            description="share of the clients left out at each end of every number, rounded up; "
            "bounds the share that may be hostile",
        )

    options: Options

    def combine(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, float]]:
        # With few clients, trim down to the median, and never everything.
        trimmed = min(count_of(self.options.trim, len(rows)), (len(rows) - 1) // 2)
        kept = slice(trimmed, len(rows) - trimmed)
        return coordinatewise(rows, lambda columns: columns[kept].mean(dim=0)), {"trimmed": trimmed}
