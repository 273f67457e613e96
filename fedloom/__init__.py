"""fedloom: fine-tune large language models on the data of many owners. Each owner keeps its own data.

from fedloom import Recipe, run

result = run(Recipe.load("quickstart", {"train.lr": 1e-3}), out="runs/mine")
result.summary["score"]["after"]
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fedloom.common import environment  # first: settings that torch reads when it is imported
from fedloom.common.lazy import lazy
from fedloom.common.version import __version__ as __version__

if TYPE_CHECKING:
    from fedloom.algorithms.base import Algorithm as Algorithm
    from fedloom.common import registry as registry
    from fedloom.common.errors import RunFailed as RunFailed
    from fedloom.common.errors import UserError as UserError
    from fedloom.experiment.run import Result as Result
    from fedloom.experiment.run import run as run
    from fedloom.federation.hooks.base import Hook as Hook
    from fedloom.recipe.recipe import Recipe as Recipe

environment.prepare()
#: A library says nothing unless its user asks for it (common/logs.py).
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__, _find, __dir__ = lazy(
    __name__,
    {
        "Algorithm": "fedloom.algorithms.base",
        "Hook": "fedloom.federation.hooks.base",
        "Recipe": "fedloom.recipe.recipe",
        "Result": "fedloom.experiment.run",
        "RunFailed": "fedloom.common.errors",
        "UserError": "fedloom.common.errors",
        "run": "fedloom.experiment.run",
    },
    eager=("__version__",),
)


def __getattr__(name: str) -> Any:
    if name == "registry":  # where packages and notebooks add names of their own
        from importlib import import_module

        return import_module("fedloom.common.registry")
    return _find(name)
