"""Tensors of several kinds in one payload or state: each kind under a prefix of its own, such as ``control/``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def under(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the tensors under `prefix`, by their names without it, in the order of `tensors`.

    >>> under({"control/a": 1, "b": 2}, "control/")
    {'a': 1}
    """
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def without(tensors: Mapping[str, T], *prefixes: str) -> dict[str, T]:
    """Return the tensors that are under none of `prefixes`.

    >>> without({"control/a": 1, "b": 2}, "control/")
    {'b': 2}
    """
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def prefixed(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the tensors by their names with `prefix` in front: the inverse of `under`.

    >>> prefixed({"a": 1}, "control/")
    {'control/a': 1}
    """
    return {prefix + name: tensor for name, tensor in tensors.items()}
