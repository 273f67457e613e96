"""Compute the numbers of a private run before its first round."""

from __future__ import annotations

from typing import Any

from fedloom.algorithms.privacy import accounting, clipping
from fedloom.common.errors import UserError
from fedloom.recipe.privacy import PrivacyConfig
from fedloom.recipe.recipe import Recipe


def settle_privacy(recipe: Recipe, population: int) -> dict[str, Any]:
    """Fill in the open values of the recipe's privacy: δ, the noise for a wanted ε, the count's noise, n.

    Args:
        population: clients that can be sampled.

    Returns:
        Dotted recipe keys with their values; empty for a recipe without privacy.

    Raises:
        UserError: the numbers give no guarantee, or no noise can keep to them.
    """
    privacy = recipe.privacy
    if privacy is None:
        return {}
    expected = recipe.federation.sampled(population)
    delta = privacy.delta or min(1e-5, population**-1.1)
    if delta >= 1 / population:
        raise UserError(
            f"privacy.delta={delta:g} is no guarantee for {population} clients, because publishing all data of one "
            f"of them would satisfy it: set privacy.delta below {1 / population:.2g}, such as 1e-5"
        )
    values: dict[str, Any] = {"privacy.delta": delta, "privacy.population": population}
    at_clients = privacy.where == "client"
    rounds, rate = recipe.federation.rounds, 1.0 if at_clients else min(1.0, expected / population)
    factor = 2.0 if at_clients else 1.0  # against the server, a client's change has sensitivity 2C
    noise = privacy.noise
    if noise is None:
        assert privacy.epsilon is not None
        noise = factor * accounting.noise_for(privacy.epsilon, delta, rounds, rate)
    elif privacy.epsilon is not None:
        spends = accounting.spent(noise / factor, rounds, rate, delta)
        if spends > privacy.epsilon:
            raise UserError(
                f"privacy.noise={noise:g} over {rounds} rounds spends ε={spends:.3g}, more than "
                f"privacy.epsilon={privacy.epsilon:g}: leave out privacy.noise, "
                "set fewer federation.rounds, or raise privacy.epsilon"
            )
    values["privacy.noise"] = noise
    if privacy.adaptive is not None:
        values["privacy.adaptive.noise"] = clipping.count_noise(privacy.adaptive, noise, expected)
    filled = recipe.with_values(values).privacy
    assert filled is not None
    clipping.deviations(filled, expected)
    return values


def describe_privacy(privacy: PrivacyConfig) -> list[str]:
    """Describe what a private run does. `privacy` has its open values filled in; the result is a list of sentences."""
    clipped = f"privacy: every client counts the same, whatever its data; changes are clipped to {privacy.clip:g}"
    if not privacy.noise:
        return [f"{clipped}, and no noise is added: nothing is promised"]
    target = f", to keep to ε={privacy.epsilon:g}" if privacy.epsilon else ""
    sentences = [
        f"{clipped}, and noise of {privacy.noise:g} times the clip is added at the {privacy.where}{target} "
        f"(δ={privacy.delta:g})"
    ]
    if privacy.seeded:
        sentences.append(
            "privacy: the noise follows from the recipe's seed, so this holds only against those who do not know it"
        )
    return sentences
