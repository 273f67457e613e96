"""A recipe's algorithm, made in the same way on both sides: the one behind its name, wrapped where privacy is asked for.

Whatever cannot be private is refused here, before any work. This file makes halves; it does not run them.
"""

from __future__ import annotations

from typing import Any

from fedloom import registry
from fedloom.algorithms import accounting, clipping
from fedloom.algorithms.base import Algorithm, parse_options
from fedloom.algorithms.private import Private
from fedloom.config import Recipe
from fedloom.errors import UserError


def make(recipe: Recipe) -> Algorithm:
    """A half of the recipe's algorithm. Raises UserError for an unknown name or option, or one that cannot be private."""
    name = recipe.algorithm.name
    cls = registry.algorithms.get(name)
    inner: Algorithm = cls(parse_options(cls, name, recipe.algorithm.options), recipe.seed, recipe.adapter)
    privacy = recipe.privacy
    if privacy is None:
        return inner
    check_private(name)
    # Before the split is known there is no expected number: what is made then is only looked at.
    return Private(inner, privacy, recipe.federation.sampled(privacy.population or 1))


def check_private(name: str) -> None:
    """Raises UserError where the algorithm is no plain sum over clients, or nothing could count what is spent."""
    accounting.library()
    if not _can_be_private(name):
        able = ", ".join(n for n in registry.algorithms.names() if _can_be_private(n))
        raise UserError(
            f"privacy needs an algorithm that is a plain sum over clients, which {name} is not: use one of {able}, or set "
            "privacy=null"
        )


def _can_be_private(name: str) -> bool:
    properties = registry.algorithms.get(name).properties
    return bool(properties.linear_sum and not properties.pooled)


def settled(recipe: Recipe, population: int) -> Recipe:
    """The recipe with its privacy's open values filled in: δ, the noise for a wanted ε, the count's noise, n.

    Args:
        population: clients that can be sampled.

    Raises UserError where the numbers promise nothing or cannot be kept.
    """
    privacy = recipe.privacy
    if privacy is None:
        return recipe
    expected = recipe.federation.sampled(population)
    delta = privacy.delta or min(1e-5, population**-1.1)
    if delta >= 1 / population:
        raise UserError(
            f"privacy.delta={delta:g} is no promise to {population} clients: publishing all that one of them has would "
            f"keep it; ask for less than {1 / population:.2g}, such as 1e-5"
        )
    values: dict[str, Any] = {"privacy.delta": delta, "privacy.population": population}
    at_clients = privacy.where == "client"
    rounds, rate = recipe.federation.rounds, 1.0 if at_clients else min(1.0, expected / population)
    factor = 2.0 if at_clients else 1.0  # against the server a client's change has the sensitivity 2C
    noise = privacy.noise
    if noise is None:
        assert privacy.epsilon is not None
        noise = factor * accounting.noise_for(privacy.epsilon, delta, rounds, rate)
    elif privacy.epsilon is not None:
        spends = accounting.spent(noise / factor, rounds, rate, delta)
        if spends > privacy.epsilon:
            raise UserError(
                f"privacy.noise={noise:g} over {rounds} rounds spends ε={spends:.3g}, more than "
                f"privacy.epsilon={privacy.epsilon:g}: leave privacy.noise out, ask for fewer rounds, or raise the epsilon"
            )
    values["privacy.noise"] = noise
    if privacy.adaptive is not None:
        values["privacy.adaptive.noise"] = clipping.count_noise(privacy.adaptive, noise, expected)
    recipe = recipe.with_values(values)
    assert recipe.privacy is not None
    clipping.deviations(recipe.privacy, expected)
    return recipe
