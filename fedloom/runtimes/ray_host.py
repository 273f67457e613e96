"""A process that acts as any client of a simulation, one after another. It runs inside an actor of `ray.py`.

    open   receives recipe and data once → loads the frozen base, once for this process
    work   receives an assignment and the client's state → returns the outcome and the new state

A host keeps no client's state between two pieces of work: the state travels with the work. So any other host can do the
next piece, and a host that dies loses nothing. This file knows neither the engine nor an algorithm.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloom.common import environment
from fedloom.common.errors import UserError
from fedloom.common.files import folder_name
from fedloom.data.federated import FederatedData
from fedloom.federation.client import Client
from fedloom.federation.workplace import open_client, open_models, open_template
from fedloom.messages import wire
from fedloom.messages.at_rest import decode_state, encode_state
from fedloom.messages.types import Payload
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes import versions


@dataclass(frozen=True)
class Orders:
    """What a host receives before its first work. `recipe` is resolved; `threads` are for torch."""

    recipe: Mapping[str, Any]
    data: FederatedData
    threads: int


@dataclass(frozen=True)
class Opened:
    """What a host reports once it is open. `trouble` says why it cannot work, and is empty if it can."""

    trouble: str
    versions: Mapping[str, str]
    late_settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What a host returns: the parts of the outcome's message, the client's new state, and files that `save` wrote."""

    start: bytes
    body: np.ndarray
    digest: bytes
    state: bytes | None
    files: Mapping[str, bytes]

    def message(self) -> wire.Split:
        return wire.Split(self.start, self.body.data, self.digest)


class Carried:
    """A store for one piece of work: `load` gives the state that came with it; saved state returns with the outcome."""

    def __init__(self) -> None:
        self.came: bytes | None = None
        self.goes: bytes | None = None

    def load(self, client: str, up_to: int) -> dict[str, Payload]:
        return decode_state(self.came)

    def save(self, client: str, round: int, state: Mapping[str, Payload]) -> None:
        self.goes = encode_state(state)


class Host:
    """Opens once, then does one piece of work after another."""

    def __init__(self) -> None:
        self._state = Carried()
        self._client: Client
        self._recipe: Mapping[str, Any]
        self._folder = Path(tempfile.gettempdir())

    def open(self, orders: Orders) -> Opened:
        """Load the base. Returns a sentence if this machine cannot run the recipe; a programming error propagates."""
        torch.set_num_threads(orders.threads)
        try:
            self._open(orders)
        except UserError as error:
            return Opened(str(error), versions.own())
        return Opened("", versions.own(), tuple(environment.late_settings()))

    def _open(self, orders: Orders) -> None:
        recipe = Recipe.parse(orders.recipe)
        models = open_models(recipe)
        template = open_template(recipe, models.base().tokenizer)
        self._folder = Path(tempfile.mkdtemp(prefix="fedloom-host-"))
        self._recipe = orders.recipe
        self._client = open_client(recipe, models, orders.data, template, self._state, self._folder)

    def work(self, start: bytes, body: np.ndarray, digest: bytes, state: bytes | None) -> Done:
        """Do one piece of work. `body` may be a view of shared memory: it is copied once into the host's own."""
        assignment = wire.decode_assignment(wire.Split(start, body.data, digest))
        self._state.came, self._state.goes = state, None
        outcome = self._client.handle(replace(assignment, recipe=self._recipe))
        reply = wire.split(wire.encode_outcome(outcome))
        written = self._folder / folder_name(assignment.client)
        files = {p.relative_to(written).as_posix(): p.read_bytes() for p in written.rglob("*") if p.is_file()}
        shutil.rmtree(written, ignore_errors=True)
        return Done(reply.start, np.frombuffer(reply.body, np.uint8), reply.digest, self._state.goes, files)

    def close(self) -> None:
        """Delete the host's temporary files."""
        shutil.rmtree(self._folder, ignore_errors=True)
