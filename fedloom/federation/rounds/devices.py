"""Simulate clients' devices in virtual time: speed, connection, memory and availability.

    seconds = bytes down / download  +  operations / speed  +  bytes up / upload

Operations are the closed form of training/flops.py; bytes are those of the tensors after the operators. Nothing here is
a measured time, so the same recipe gives the same times on every machine, and a resumed run repeats them. (Headers do not
count, because a resumed run sends the recipe a second time.) Evaluation takes no time: a curve over time shows training.

A client's device is drawn once. For each round it is drawn which clients are available and which vanish. This decides
whose update counts, and changes no trained number. This file knows no algorithm and no message.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedloom.algorithms.base import Algorithm
from fedloom.common.errors import UserError
from fedloom.common.randomness import numpy_generator
from fedloom.data.corpus import Partition
from fedloom.federation.rounds.schedule import Schedule
from fedloom.federation.rounds.virtual_time import Pace, Speeds
from fedloom.messages.types import Cost
from fedloom.models.adapters import AdaptedModel
from fedloom.recipe.devices import DevicesConfig, Spread
from fedloom.recipe.recipe import Recipe

log = logging.getLogger(__name__)

#: fp32 numbers for each trained one: itself, its gradient, and what the optimiser keeps of it.
KEPT = {"adamw": 2, "sgd": 0}


def make_fleet(recipe: Recipe, clients: Partition) -> Fleet | None:
    """Draw the device of every client that trains; None for a recipe without devices. Raises UserError for a bad trace."""
    return Fleet(recipe.devices, clients.training_clients, recipe.seed) if recipe.devices is not None else None


def pace_of(recipe: Recipe, algorithm: Algorithm, fleet: Fleet | None) -> Pace | None:
    """How long clients' work takes: as their devices say; else, where the order of arrival counts, by a speed each."""
    if fleet is None and algorithm.properties.asynchronous:
        return Speeds(recipe.seed, recipe.runtime.speed_spread)
    return fleet


def bytes_needed(recipe: Recipe, model: AdaptedModel) -> int:
    """Bytes of memory that training takes on a client's device.

    Counted are the weights as they are in memory, and of each trained number its gradient and the optimiser's moments.
    Activations are not: they follow the batch.
    """
    base = sum(p.numel() * p.element_size() for p in model.module.parameters())
    return int(base) + 4 * model.adapter.layout.numel * (1 + KEPT[recipe.train.optimizer])


def with_room(recipe: Recipe, schedule: Schedule, fleet: Fleet | None, model: AdaptedModel) -> Schedule:
    """Leave out the clients whose memory does not hold the model, and sample among those who are there."""
    if fleet is None:
        return schedule
    needed = bytes_needed(recipe, model)
    small = frozenset(fleet.without_room(needed))
    training = tuple(c for c in schedule.training if c not in small)
    if small:
        log.warning(
            f"{len(small)} of {len(schedule.training)} clients have no room for the model ({needed:,} bytes) "
            "and are never sampled"
        )
    return replace(schedule, training=training, sampling=replace(schedule.sampling, there=fleet.there))


#: What is drawn from a distribution, each with its own stream of numbers; a trace may name these and the two below.
DRAWN = ("speed", "download", "upload", "memory")


CHANCES = ("available", "dropout")


@dataclass(frozen=True)
class Device:
    """What one client runs on: operations and bytes a second, bytes of memory, and two probabilities."""

    speed: float
    download: float
    upload: float
    memory: float
    available: float
    dropout: float

    def seconds(self, flops: int, down: int, up: int) -> float:
        return down / self.download + flops / self.speed + up / self.upload


class Fleet:
    """All clients' devices, as a `Pace` (virtual_time.py): how long work takes, who is lost; and who is there, who has room.

    Args:
        clients: in their fixed order.
    """

    def __init__(self, config: DevicesConfig, clients: Sequence[str], seed: int) -> None:
        self.deadline = config.deadline
        self.clients = tuple(clients)
        self._seed = seed
        traced = read_trace(Path(config.trace), self.clients) if config.trace else {}
        self.devices = {c: _drawn(config, c, seed, traced.get(c, {})) for c in self.clients}
        self._available = np.array([self.devices[c].available for c in self.clients])

    def seconds(self, client: str, cost: Cost, down: int, up: int) -> float:
        """Return the seconds from when work is sent to when its update arrives."""
        return self.devices[client].seconds(cost.train_flops, down, up)

    def there(self, round: int, attempt: int = 0) -> frozenset[str]:
        """Return the clients available at a round's start, or at the server's next attempt if they were too few."""
        numbers = numpy_generator(self._seed, "available", round, _numbered("", attempt)).random(len(self.clients))
        return frozenset(c for c, u, p in zip(self.clients, numbers, self._available, strict=True) if u < p)

    def vanishes(self, client: str, round: int, attempt: int = 0) -> bool:
        """Whether this client is lost during this round's work, at the first or a later attempt."""
        chance, key = self.devices[client].dropout, _numbered(client, attempt)
        return chance > 0 and float(numpy_generator(self._seed, "vanishing", round, key).random()) < chance

    def comes_back(self, client: str) -> bool:
        """Whether this client's work can ever arrive."""
        return self.devices[client].available > 0 and self.devices[client].dropout < 1

    def without_room(self, needed: int) -> tuple[str, ...]:
        """Return the clients that have less memory than `needed` bytes."""
        return tuple(c for c in self.clients if self.devices[c].memory < needed)

    def ranks(self, highest: int) -> dict[str, int]:
        """Return each client's rank by its memory: `highest` at the largest memory, and half of it at half the memory.

        If memory is not limited, speed takes its place. Clients without room get a rank too, but are never sampled.
        """
        limited = all(math.isfinite(d.memory) for d in self.devices.values())
        size = {c: d.memory if limited else d.speed for c, d in self.devices.items()}
        largest = max(size.values())
        return {c: max(1, highest >> max(0, round(math.log2(largest / own)))) for c, own in size.items()}


def _numbered(client: str, attempt: int) -> str:
    return f"{client}/{attempt}" if attempt else client


def _drawn(config: DevicesConfig, client: str, seed: int, said: Mapping[str, float]) -> Device:
    numbers = numpy_generator(seed, "device", 0, client).standard_normal(len(DRAWN))
    values = {}
    for name, z in zip(DRAWN, numbers, strict=True):
        spread: Spread | None = getattr(config, name)
        values[name] = spread.median * math.exp(spread.spread * float(z)) if spread else math.inf
    return Device(**{**values, "available": config.available, "dropout": config.dropout, **said})


def read_trace(path: Path, clients: Sequence[str]) -> dict[str, dict[str, float]]:
    """Read client → its device's values in the file. Raises UserError if the file is not valid."""
    known, found = frozenset(clients), {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, restkey="(a cell too many)"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"devices.trace={path} cannot be read ({type(error).__name__}): name a .csv file") from None
    columns = dict.fromkeys(c for row in rows for c in row)
    strange = columns.keys() - {"client", *DRAWN, *CHANCES}
    if "client" not in columns or strange:
        raise UserError(
            f"devices.trace={path} has the columns {', '.join(map(str, columns)) or 'of no row'}: it takes client and "
            f"any of {', '.join((*DRAWN, *CHANCES))}"
        )
    for row in rows:
        client = row["client"]
        if client not in known or client in found:
            what = "twice" if client in found else "which is no client of this split"
            raise UserError(f"devices.trace={path} names {client!r}, {what}: fix that line")
        found[client] = {k: _value(path, client, k, v) for k, v in row.items() if k != "client" and v}
    return found


def _value(path: Path, client: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    fits, wanted = (0 <= value <= 1, "from 0 to 1") if key in CHANCES else (0 < value < math.inf, "above 0")
    if not fits:
        raise UserError(f"devices.trace={path} has {key}={text!r} for {client}: it takes a number {wanted}")
    return value
