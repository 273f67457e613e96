"""A recipe's devices, decided: who has which, whom they leave out, and which rank each gets. Nothing is run here.

Only a simulation whose time is made up has devices of a recipe's making; elsewhere clients bring their own.
"""

from __future__ import annotations

from dataclasses import replace

from fedloom import registry
from fedloom.algorithms.base import Algorithm
from fedloom.algorithms.making import make
from fedloom.choices import Say
from fedloom.clock import Pace, Speeds
from fedloom.config import Recipe
from fedloom.devices import Fleet
from fedloom.errors import UserError
from fedloom.models.adapters import AdaptedModel
from fedloom.rounds import Schedule
from fedloom.types import Partition

#: fp32 numbers for each trained one: itself, its gradient, and what the optimiser keeps of it.
KEPT = {"adamw": 2, "sgd": 0}


def settle_fleet(recipe: Recipe, algorithm: Algorithm, clients: Partition) -> tuple[Fleet | None, Recipe, Algorithm]:
    """The clients' devices, and recipe and algorithm with the ranks that follow from them. Raises UserError."""
    by_device = recipe.adapter.ranks == "by device"
    if recipe.devices is None:
        if by_device:
            raise UserError(
                'adapter.ranks="by device" needs devices: add a devices section, or give each client its rank'
            )
        return None, recipe, algorithm
    name, properties = recipe.algorithm.name, algorithm.properties
    if not getattr(registry.runtimes.get(recipe.runtime.name), "virtual", False):
        raise UserError(
            f"devices are simulated, and time is real with runtime.name={recipe.runtime.name}: use runtime.name=simulator"
        )
    if recipe.privacy is not None:
        raise UserError(
            "devices cannot be had with privacy, whose accountant does not know who is there or late: leave one of them out"
        )
    if properties.pooled or properties.offsite:
        why = (
            "trains on everybody's data in one place" if properties.pooled else "sends an emulator anew after a restart"
        )
        raise UserError(f"devices cannot be had with algorithm {name}, which {why}: leave devices out")
    if properties.asynchronous and recipe.devices.deadline is not None:
        raise UserError(
            f"devices.deadline={recipe.devices.deadline:g} but algorithm {name} waits for nobody: leave devices.deadline out"
        )
    fleet = Fleet(recipe.devices, clients.training_clients, recipe.seed)
    if by_device:
        recipe = recipe.with_values({"adapter.ranks": fleet.ranks(recipe.adapter.rank)})
        algorithm = make(recipe)
    return fleet, recipe, algorithm


def pace_of(recipe: Recipe, algorithm: Algorithm, fleet: Fleet | None) -> Pace | None:
    """How long clients' work takes: as their devices say; else, where the order of arrival counts, by a speed each."""
    if fleet is None and algorithm.properties.asynchronous:
        return Speeds(recipe.seed, recipe.runtime.speed_spread)
    return fleet


def with_room(recipe: Recipe, schedule: Schedule, fleet: Fleet | None, model: AdaptedModel, say: Say) -> Schedule:
    """The schedule without clients whose memory does not hold the model. Raises UserError where too few are left.

    Counted are the weights as they are in memory, and of each trained number its gradient and the optimiser's moments.
    Activations are not: they follow the batch.
    """
    if fleet is None:
        return schedule
    base = sum(p.numel() * p.element_size() for p in model.module.parameters())
    needed = base + 4 * model.adapter.layout.numel * (1 + KEPT[recipe.train.optimizer])
    small = frozenset(fleet.without_room(needed))
    training = tuple(c for c in schedule.training if c not in small)
    if small:
        say(
            f"{len(small)} of {len(schedule.training)} clients have no room for the model ({needed:,} bytes) "
            "and are never sampled"
        )
    fewest = max(1, schedule.federation.min_clients)
    if len(training) < fewest:
        raise UserError(
            f"only {len(training)} clients have the {needed:,} bytes that this model takes and {fewest} are needed: "
            "raise devices.memory.median, or take a smaller model"
        )
    coming = sum(fleet.comes_back(c) for c in training)
    if coming < fewest:
        raise UserError(
            f"only {coming} of {len(training)} clients can ever be there and end their work, and {fewest} are needed: raise "
            "available above 0 and lower dropout below 1, in devices or in devices.trace"
        )
    share = schedule.federation.clients_per_round
    if isinstance(share, int) and share > len(training):
        raise UserError(
            f"federation.clients_per_round={share} but only {len(training)} clients have room for the model: ask for fewer"
        )
    return replace(schedule, training=training, there=fleet.there)
