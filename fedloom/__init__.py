"""fedloom: fine-tune large language models across many owners of data, none of whom hands its data over.

from fedloom import Recipe, run

result = run(Recipe.load("quickstart", {"train.lr": 1e-3}), out="runs/mine")
result.summary["score"]["after"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedloom import environment  # first: settings that torch reads when it is imported

__version__ = "0.1.0"

#: Public name → where it lives; imported on first use, so that `fedloom --help` does not wait for torch.
_PUBLIC = {
    "Recipe": "fedloom.config",
    "run": "fedloom.experiment",
    "Result": "fedloom.experiment",
    "Algorithm": "fedloom.algorithms.base",
    "Hook": "fedloom.hooks.base",
    "UserError": "fedloom.errors",
    "RunFailed": "fedloom.errors",
}

__all__ = ["Algorithm", "Hook", "Recipe", "Result", "RunFailed", "UserError", "__version__", "run"]

if TYPE_CHECKING:
    from fedloom.algorithms.base import Algorithm
    from fedloom.config import Recipe
    from fedloom.errors import RunFailed, UserError
    from fedloom.experiment import Result, run
    from fedloom.hooks.base import Hook

environment.prepare()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
