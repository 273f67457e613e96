"""Coordinate-wise robust rules: the median, and the mean without the extremes, of each number over the clients.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv 1803.01498, Definitions 1
and 2, applied to the clients' adapters. Every client has one voice: how many examples it has is its own claim, and a
weight that a client may choose undoes every bound. What is not finite is refused before it gets here (`base.accept`).
Such a rule needs all of a round's updates at once. The whole adapter travels, both ways.

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

#: Columns looked at together: bounds the scratch memory of a rule at clients × this many numbers.
COLUMNS = 1 << 20


class HoldsAll(base.Algorithm):
    """Gathers a round's updates, in client order, for a rule that cannot stream."""

    properties: ClassVar = base.Properties(streams=False, neutral={})

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        rows = [Adapter.of(update.payload.tensors).flat for update in updates]
        if not rows:
            raise ValueError("the aggregate of no updates does not exist")
        result, metrics = self.combine(rows)
        moved = float((result - self.shared.flat).norm())
        self.shared.copy_(result)
        return {"distance_moved": moved, **metrics}

    @abstractmethod
    def combine(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, float]]:
        """One adapter from the clients' ([numel] each), and numbers worth logging."""


def coordinatewise(rows: Sequence[torch.Tensor], fold: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`fold` ([clients, columns] fp64, each column sorted → [columns]) over blocks of columns: [numel] fp32."""
    parts = zip(*(torch.split(row, COLUMNS) for row in rows), strict=True)
    return torch.cat([fold(torch.stack(part).double().sort(dim=0).values).float() for part in parts])


def median(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each number; of an even count the mean of the two in the middle. [numel] fp32."""
    low, high = (len(rows) - 1) // 2, len(rows) // 2
    return coordinatewise(rows, lambda columns: (columns[low] + columns[high]) / 2)


def count_of(share: float, clients: int) -> int:
    """How many clients a share stands for, rounded up, so that a promised share is always covered."""
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
        # Few clients: down to the median, never to nothing.
        trimmed = min(count_of(self.options.trim, len(rows)), (len(rows) - 1) // 2)
        kept = slice(trimmed, len(rows) - trimmed)
        return coordinatewise(rows, lambda columns: columns[kept].mean(dim=0)), {"trimmed": trimmed}
