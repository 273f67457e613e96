"""fedloom: fine-tune large language models across many owners of data, none of whom hands its data over.

from fedloom import Recipe, run

result = run(Recipe.load("quickstart", {"train.lr": 1e-3}), out="runs/mine")
result.summary["score"]["after"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedloom.common import environment  # first: settings that torch reads when it is imported
from fedloom.common.version import __version__

if TYPE_CHECKING:
    from fedloom.algorithms.base import Algorithm
    from fedloom.common import registry as registry
    from fedloom.common.errors import RunFailed, UserError
    from fedloom.experiment.run import Result, run
    from fedloom.federation.hooks.base import Hook
    from fedloom.recipe.recipe import Recipe

#: Public name → where it lives; imported on first use, so that `fedloom --help` does not wait for torch.
_PUBLIC = {
    "Recipe": "fedloom.recipe.recipe",
    "run": "fedloom.experiment.run",
    "Result": "fedloom.experiment.run",
    "Algorithm": "fedloom.algorithms.base",
    "Hook": "fedloom.federation.hooks.base",
    "UserError": "fedloom.common.errors",
    "RunFailed": "fedloom.common.errors",
}


__all__ = ["Algorithm", "Hook", "Recipe", "Result", "RunFailed", "UserError", "__version__", "run"]

environment.prepare()


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name == "registry":  # where packages and notebooks add names of their own
        return import_module("fedloom.common.registry")
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
