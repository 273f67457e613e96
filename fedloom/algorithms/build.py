"""Build a recipe's algorithm, the same way on both sides: look it up by name, and wrap it if the recipe has privacy.

An algorithm that cannot be private is rejected here, before any work. This file builds halves; it does not run them.
"""

from __future__ import annotations

from fedloom.algorithms.base import Algorithm, AlgorithmOptions
from fedloom.algorithms.privacy import accounting
from fedloom.algorithms.privacy.private import Private
from fedloom.common import registry
from fedloom.common.complaints import parse_options
from fedloom.common.errors import UserError
from fedloom.recipe.recipe import Recipe


def make(recipe: Recipe) -> Algorithm:
    """Build a half of the algorithm. Raises UserError for an unknown name or option, or if it cannot be private."""
    name = recipe.algorithm.name
    cls = registry.algorithms.get(name)
    inner: Algorithm = cls(options_of(cls, recipe), recipe.seed, recipe.adapter)
    privacy = recipe.privacy
    if privacy is None:
        return inner
    accounting.library()
    if not can_be_private(name):
        raise UserError(not_private(name))
    # Before the split there is no population: an instance built then is only inspected.
    return Private(inner, privacy, recipe.federation.sampled(privacy.population or 1))


def options_of(cls: type[Algorithm], recipe: Recipe) -> AlgorithmOptions:
    """The recipe's options of `cls`, checked. Raises UserError with the nearest valid one."""
    return parse_options(cls.Options, recipe.algorithm.options, recipe.algorithm.name, "algorithm.")


def can_be_private(name: str) -> bool:
    """Whether an algorithm is a plain sum over clients, so that the privacy spent can be computed."""
    properties = registry.algorithms.get(name).properties
    return bool(properties.linear_sum and not properties.pooled)


def not_private(name: str) -> str:
    """Return the error message for an algorithm that cannot be private."""
    able = ", ".join(n for n in registry.algorithms.names() if can_be_private(n))
    return (
        f"privacy needs an algorithm that is a plain sum over clients, which {name} is not: use one of {able}, or set "
        "privacy=null"
    )
