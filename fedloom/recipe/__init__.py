"""Recipes: what a run is asked to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.recipe.adapter import AdapterConfig as AdapterConfig
    from fedloom.recipe.recipe import Recipe as Recipe
    from fedloom.recipe.sections import ModelConfig as ModelConfig
    from fedloom.recipe.sections import SplitConfig as SplitConfig
    from fedloom.recipe.train import TrainConfig as TrainConfig

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "AdapterConfig": "fedloom.recipe.adapter",
        "ModelConfig": "fedloom.recipe.sections",
        "Recipe": "fedloom.recipe.recipe",
        "SplitConfig": "fedloom.recipe.sections",
        "TrainConfig": "fedloom.recipe.train",
    },
)
