"""Local training of one client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.training.trainer import FitResult as FitResult
    from fedloom.training.trainer import LocalRun as LocalRun

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "FitResult": "fedloom.training.trainer",
        "LocalRun": "fedloom.training.trainer",
    },
)
