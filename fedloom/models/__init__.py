"""Base models, the adapters in them, and the layout of an adapter's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.models.adapters import AdaptedModel as AdaptedModel
    from fedloom.models.attach import Models as Models
    from fedloom.models.layout import Adapter as Adapter
    from fedloom.models.layout import Layout as Layout
    from fedloom.models.layout import WeightedMean as WeightedMean

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "AdaptedModel": "fedloom.models.adapters",
        "Adapter": "fedloom.models.layout",
        "Layout": "fedloom.models.layout",
        "Models": "fedloom.models.attach",
        "WeightedMean": "fedloom.models.layout",
    },
)
