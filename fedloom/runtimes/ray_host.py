"""A process that plays any of a simulation's clients, one after another: what runs inside an actor of `ray.py`.

    open   recipe and data come once → the frozen base is loaded, once for this process
    work   an assignment and the client's own state come → the outcome and the state as it is afterwards go back

Nothing of a client stays here between two pieces of work: its state travels with the work, so the next one may be done by
any other host, and a host that dies takes nothing along. This file knows neither the engine nor an algorithm.
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
from fedloom.messages.at_rest import packed, unpacked
from fedloom.messages.types import Payload
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes import versions


@dataclass(frozen=True)
class Orders:
    """What a host is told before its first work. `recipe` is resolved; `threads` are for torch."""

    recipe: Mapping[str, Any]
    data: FederatedData
    threads: int


@dataclass(frozen=True)
class Opened:
    """What a host says once it is open. `trouble` is a sentence where it cannot work."""

    trouble: str
    versions: Mapping[str, str]
    late_settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What comes back: the outcome's message in its pieces, the client's new state, files that `save` wrote."""

    start: bytes
    body: np.ndarray
    digest: bytes
    state: bytes | None
    files: Mapping[str, bytes]

    def message(self) -> wire.Split:
        return wire.Split(self.start, self.body.data, self.digest)


class Carried:
    """A client's state on its way: `load` gives what came with the work, what is saved goes back with its outcome."""

    def __init__(self) -> None:
        self.came: bytes | None = None
        self.goes: bytes | None = None

    def load(self, client: str, up_to: int) -> dict[str, Payload]:
        return unpacked(self.came)

    def save(self, client: str, round: int, state: Mapping[str, Payload]) -> None:
        self.goes = packed(state)


class Host:
    """Opened once, then given one piece of work after another."""

    def __init__(self) -> None:
        self._state = Carried()
        self._client: Client
        self._recipe: Mapping[str, Any]
        self._folder = Path(tempfile.gettempdir())

    def open(self, orders: Orders) -> Opened:
        """Load the base. A recipe that this machine cannot run is a sentence; a programming error propagates."""
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
        """Do one piece of work. `body` may be a window into shared memory: it is read once, into the host's own."""
        assignment = wire.decode_assignment(wire.Split(start, body.data, digest))
        self._state.came, self._state.goes = state, None
        outcome = self._client.handle(replace(assignment, recipe=self._recipe))
        reply = wire.split(wire.encode_outcome(outcome))
        written = self._folder / folder_name(assignment.client)
        files = {p.relative_to(written).as_posix(): p.read_bytes() for p in written.rglob("*") if p.is_file()}
        shutil.rmtree(written, ignore_errors=True)
        return Done(reply.start, np.frombuffer(reply.body, np.uint8), reply.digest, self._state.goes, files)

    def close(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._folder, ignore_errors=True)
