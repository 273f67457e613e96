"""The server's side of every message: it sends assignments to clients and takes their outcomes.

    algorithm → payload → Assignment → operators → runtime → operators → Update | Failure

A client that gets its first message, or that was lost since its last one, is sent the recipe and the initial broadcast. This
file does not know rounds, and neither trains nor measures.

An update passes four generators between the runtime's reply and the algorithm's `aggregate`, each of which lets go of it
before it asks for the next, so that memory holds one update at a time:

    Runtime.run  →  Dispatcher.received  →  the round's outcomes  →  UpdateSource.updates  →  Algorithm.aggregate
    a reply         its cost, decoded       late, lost, retried        refused ones out, in client order
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedloom.algorithms.base import Algorithm
from fedloom.federation.record.events import Events
from fedloom.federation.rounds.virtual_time import VirtualTime
from fedloom.federation.runtime import Runtime
from fedloom.federation.watch import Tick
from fedloom.messages.operators.channel import ServerChannel
from fedloom.messages.types import LOST_STATE, UNEXPECTED_CODING, VANISHED, Assignment, Failure, Outcome, Update


@dataclass(frozen=True)
class Terms:
    """What all assignments of a run have in common.

    Attributes:
        recipe: the resolved recipe as clients get it, sent with the first assignment of each client.
        rounds: how many rounds the run has.
        steps: optimiser steps of one training, None where clients count epochs.
        score: whether clients also answer questions, in addition to the loss.
    """

    recipe: Mapping[str, Any]
    rounds: int
    steps: int | None
    score: bool


class Dispatcher:
    """Sends the assignments of one run.

    Args:
        channel: the operators that payloads go through; None where the recipe names none.
        tick: called as clients come back.
        virtual_time: times the work, where the runtime does it at once; None where time is real.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        runtime: Runtime,
        terms: Terms,
        channel: ServerChannel | None,
        events: Events,
        tick: Tick,
        virtual_time: VirtualTime | None = None,
    ) -> None:
        self.runtime = runtime
        self.terms = terms
        self.channel = channel
        self.tick = tick
        self.virtual_time = virtual_time
        self._algorithm, self._events = algorithm, events
        self._contacted: set[str] = set()
        self._fresh: set[str] = set()  # whose first message is on its way

    def assignment(self, client: str, kind: Any, round: int, dataset: Any = "test") -> Assignment:
        """One piece of work, as it travels; the first one to a client carries the recipe and the initial broadcast."""
        first = client not in self._contacted
        self._contacted.add(client)
        if first:
            self._fresh.add(client)
        algorithm, terms = self._algorithm, self.terms
        payload = algorithm.initial_payload(client) if first else algorithm.round_payload(client)
        assignment = Assignment(
            kind=kind,
            client=client,
            round=round,
            rounds=terms.rounds,
            payload=payload,
            steps=terms.steps if kind == "train" else None,
            dataset=dataset,
            score=terms.score,
            recipe=terms.recipe if first else None,
        )
        if self.channel is None:
            return assignment
        return self.channel.encode(assignment, first and algorithm.own_initial)

    def outcomes(self, kind: Any, round: int, clients: Sequence[str], dataset: Any = "test") -> Iterator[Outcome]:
        """Send one assignment to each client; outcomes as they arrive."""
        total = len(clients)
        self.tick(kind, round, 0, total)
        assignments = (self.assignment(client, kind, round, dataset) for client in clients)
        return self.received(assignments, kind, lambda done: self.tick(kind, round, done, total))

    def received(
        self, assignments: Iterable[Assignment | None], kind: str, came: Callable[[int], None] | None = None
    ) -> Iterator[Outcome]:
        """Outcomes of `assignments` as they arrive, with payloads of training decoded.

        Args:
            came: called with the number of outcomes so far.
        """
        pending, time, count = iter(assignments), self.virtual_time, 0
        while True:
            for outcome in self.runtime.run(pending if time is None else time.until_lost(pending)):
                count += 1
                if time is not None:
                    time.note(outcome)
                outcome = self._taken(outcome, kind)
                if came is not None:
                    came(count)
                yield outcome
                del outcome  # here as everywhere on an update's way: two of them in memory would be one too many
            gone = time.lost() if time is not None else None
            if gone is None:
                return
            count += 1
            failed = self._taken(gone, kind)
            if came is not None:
                came(count)
            yield failed

    def _taken(self, outcome: Outcome, kind: str) -> Outcome:
        """The runtime's outcome with the cost of a first message told apart, whatever a site says of it, and decoded.

        A client that lost its state, or that no message reached, gets everything with its next message.
        """
        first = outcome.cost.download_bytes if outcome.client in self._fresh else 0
        self._fresh.discard(outcome.client)
        if isinstance(outcome, Failure) and outcome.reason in LOST_STATE | VANISHED:
            self._contacted.discard(outcome.client)
        outcome = replace(outcome, cost=replace(outcome.cost, broadcast_bytes=first))
        if self.channel is not None:
            return self.channel.decode(outcome) if kind == "train" else outcome
        if isinstance(outcome, Update) and outcome.payload.coding is not None:
            return Failure(outcome.client, outcome.round, "bad_payload", UNEXPECTED_CODING, outcome.cost)
        return outcome

    def failed(self, failure: Failure, kind: str) -> None:
        """Write the event of a failure."""
        self._events.write(
            "client_failed",
            round=failure.round,
            client=failure.client,
            kind=kind,
            reason=failure.reason,
            detail=failure.detail,
        )
