"""Let a package offer names that are imported on first use, so that `fedloom --help` does not wait for torch.

A package's `__init__` lists its public names in a table and repeats them under `TYPE_CHECKING` for type checkers:

    __all__, __getattr__, __dir__ = lazy(__name__, {"Suite": "fedloom.evaluation.suites"})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str, places: Mapping[str, str], *, eager: tuple[str, ...] = ()
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__all__`, `__getattr__` and `__dir__` of a package.

    Args:
        package: the package's `__name__`.
        places: public name → the module that defines it.
        eager: public names that the package defines itself.

    Returns:
        The three, in this order. `__getattr__` raises AttributeError for any other name.
    """
    names = sorted([*places, *eager])

    def find(name: str) -> Any:
        if name in places:
            return getattr(import_module(places[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return names, find, lambda: list(names)
