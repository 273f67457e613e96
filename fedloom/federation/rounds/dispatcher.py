"""The server's side of every message: work that is sent, outcomes as they come back, and what is said of a failure.

    algorithm → payload → Assignment → operators → runtime → operators → Update | Failure

A client that is met for the first time, or that was lost since, is sent the recipe and the initial broadcast. This file
does not know rounds, and neither trains nor measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedloom.algorithms.base import Algorithm
from fedloom.federation.record.events import Events
from fedloom.federation.rounds.schedule import Schedule
from fedloom.federation.runtime import Runtime, Tick
from fedloom.messages.operators.channel import ServerChannel
from fedloom.messages.types import STARTED_ANEW, VANISHED, Assignment, Failure, Outcome


class Sender:
    """Sends assignments of one run.

    Args:
        recipe: the resolved recipe, sent with the first assignment of each client.
        channel: the operators that payloads go through.
        score: whether clients answer questions besides the loss.
        tick: called as clients come back.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        runtime: Runtime,
        schedule: Schedule,
        channel: ServerChannel,
        events: Events,
        recipe: Mapping[str, Any],
        score: bool,
        tick: Tick,
    ) -> None:
        self.runtime = runtime
        self.channel = channel
        self._algorithm, self._schedule, self._events = algorithm, schedule, events
        self._recipe, self._score, self._tick = recipe, score, tick
        self._contacted: set[str] = set()
        self._fresh: set[str] = set()  # whose first message is on its way

    def assignment(self, client: str, kind: Any, round: int, dataset: Any = "test") -> Assignment:
        """One piece of work, as it travels; the first one to a client carries the recipe and the initial broadcast."""
        first = client not in self._contacted
        self._contacted.add(client)
        if first:
            self._fresh.add(client)
        algorithm = self._algorithm
        payload = algorithm.initial_payload(client) if first else algorithm.round_payload(client)
        assignment = Assignment(
            kind=kind,
            client=client,
            round=round,
            rounds=self._schedule.federation.rounds,
            payload=payload,
            steps=self._schedule.steps if kind == "train" else None,
            dataset=dataset,
            score=self._score,
            recipe=self._recipe if first else None,
        )
        return self.channel.sent(assignment, first and algorithm.own_initial)

    def trained(self, assignments: Iterable[Assignment | None]) -> Iterator[Outcome]:
        """Outcomes of training, their payloads decoded, as they arrive."""
        return self.channel.opening(self.run(assignments))

    def run(self, assignments: Iterable[Assignment | None]) -> Iterator[Outcome]:
        """The runtime's outcomes, with the cost of first messages told apart, whatever a site says of it.

        A client that starts anew, or that no message reached, is told everything when it is asked next.
        """
        for outcome in self.runtime.run(assignments):
            first = outcome.cost.download_bytes if outcome.client in self._fresh else 0
            self._fresh.discard(outcome.client)
            if isinstance(outcome, Failure) and outcome.reason in STARTED_ANEW | VANISHED:
                self._contacted.discard(outcome.client)
            outcome = replace(outcome, cost=replace(outcome.cost, broadcast_bytes=first))
            yield outcome
            del outcome  # as in `outcomes`

    def outcomes(self, kind: Any, round: int, clients: Sequence[str], dataset: Any = "test") -> Iterator[Outcome]:
        """Send one assignment to each client; outcomes as they arrive."""
        self._tick(kind, round, 0, len(clients))
        assignments = (self.assignment(client, kind, round, dataset) for client in clients)
        done = 0
        for outcome in self.trained(assignments) if kind == "train" else self.run(assignments):
            done += 1  # noqa: SIM113  (its tuple would hold on to the outcome)
            self._tick(kind, round, done, len(clients))
            yield outcome
            del outcome  # as everywhere on an update's way: two of them in memory would be one too many

    def failed(self, failure: Failure, kind: str) -> None:
        """The event of a failure."""
        self._events.write(
            "client_failed",
            round=failure.round,
            client=failure.client,
            kind=kind,
            reason=failure.reason,
            detail=failure.detail,
        )
