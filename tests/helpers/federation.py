"""A federation that a test drives by hand: one server half, and one `Client` that plays everybody, through real messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom.experiment.prepare import prepare
from fedloom.federation.client import Client
from fedloom.federation.record.checkpoints import ClientStore
from fedloom.federation.watch import Watch
from fedloom.messages import wire
from fedloom.messages.types import Assignment, Failure, Outcome, Payload, Update
from fedloom.models.attach import Models
from fedloom.recipe.recipe import Recipe


@dataclass
class Message:
    """What went over the wire for one assignment."""

    kind: str
    client: str
    round: int
    down: Payload
    up: Payload | None
    down_bytes: int
    up_bytes: int


class Federation:
    """`round(1)` trains and aggregates, `evaluate("a", 1)` measures; `messages` holds all that travelled."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        setting = prepare(recipe, Watch())
        self.setting, self.recipe, self.folder = setting, setting.recipe, folder
        self.server = setting.algorithm
        self.clients = setting.data.partition.training_clients
        self.model = setting.model
        self.store = ClientStore(folder / "clients")
        self.client = self.process(setting.models)
        self.messages: list[Message] = []
        self._met: set[str] = set()

    def process(self, models: Models | None = None) -> Client:
        """A client process: of this federation's model, or with a model of its own."""
        s = self.setting
        own = models or Models(self.recipe.model, self.recipe.adapter, self.recipe.seed, s.models.device)
        return Client(own, s.data, s.template, self.store, self.folder / "adapters", s.found.suite)

    def assignment(self, kind: Any, client: str, round: int) -> Assignment:
        first = client not in self._met
        self._met.add(client)
        payload = self.server.initial_payload(client) if first else self.server.round_payload(client)
        return Assignment(
            kind, client, round, self.recipe.federation.rounds, payload,
            steps=self.recipe.train.steps if kind == "train" else None, recipe=self.recipe.resolved(),
        )  # fmt: skip

    def send(self, assignment: Assignment, process: Client | None = None) -> Outcome:
        down = wire.encode_assignment(assignment)
        received = wire.decode_assignment(down)
        up = wire.encode_outcome((process or self.client).handle(received))
        outcome = wire.decode_outcome(up)
        payload = outcome.payload if isinstance(outcome, Update) else None
        self.messages.append(
            Message(received.kind, received.client, received.round, received.payload, payload, len(down), len(up))
        )
        return outcome

    def train(self, client: str, round: int) -> Update:
        outcome = self.send(self.assignment("train", client, round))
        assert isinstance(outcome, Update), outcome
        self.server.accept(outcome)
        return outcome

    def round(self, number: int, clients: Sequence[str] | None = None) -> list[Update]:
        updates = [self.train(c, number) for c in (clients or self.clients)]
        self.server.aggregate(iter(updates))
        self.server.server_step()
        return updates

    def evaluate(self, client: str, finished: int) -> Update:
        outcome = self.send(self.assignment("evaluate", client, finished))
        assert not isinstance(outcome, Failure), outcome
        return outcome

    def live(self) -> torch.Tensor:
        """What stands in the live model, such as after `evaluate`."""
        return self.model.adapter.flat.clone()

    def evaluated(self, client: str, finished: int) -> torch.Tensor:
        self.evaluate(client, finished)
        return self.live()
