"""Rounds behind one barrier: all sampled clients are sent work, and the round ends with the last of them.

    sample clients → send to all → those that were lost, again → those that are late, dropped → in client order

The asynchronous way is asynchronous.py. This file knows no algorithm and no message.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from fedloom.federation.rounds.collection import Accept, below_quorum
from fedloom.federation.rounds.dispatcher import Dispatcher
from fedloom.federation.rounds.schedule import ATTEMPTS, Schedule
from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import LOST_STATE, VANISHED, Failure, Outcome, Payload, Update

#: Seconds between two times that a lost client is asked whether it is back, where a round is below quorum.
PAUSE = 1.0


class ClientOrder:
    """Puts outcomes into client order, so that an aggregate is the same, bit for bit, whatever order they arrive in.

    Payloads that arrive early wait on disk, so memory holds one update at a time.

    Args:
        order: the clients of the round.
        folder: where payloads wait; nothing is left in it at the end of the block.
    """

    def __init__(self, order: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._order, self._position = order, {client: i for i, client in enumerate(order)}
        self._scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".early-")
        self._waiting: dict[str, Outcome] = {}
        self._turn = 0

    def __enter__(self) -> ClientOrder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._scratch.cleanup()

    def add(self, outcome: Outcome) -> None:
        """Take an outcome. Where it is not this client's turn its payload goes to disk."""
        if isinstance(outcome, Update) and self._position[outcome.client] != self._turn:
            self._file(outcome.client).write_bytes(to_bytes(outcome.payload))
            outcome = replace(outcome, payload=Payload())
        self._waiting[outcome.client] = outcome

    def next(self, over: bool = False) -> Outcome | None:
        """The outcome whose turn it is; None where it is not there yet.

        Args:
            over: nothing more arrives, so clients without an outcome are passed over.
        """
        while self._turn < len(self._order):
            outcome = self._waiting.pop(self._order[self._turn], None)
            if outcome is not None:
                return self._fetched(outcome)
            if not over:
                return None
            self._turn += 1
        return None

    def _fetched(self, outcome: Outcome) -> Outcome:
        self._turn += 1
        path = self._file(outcome.client)
        if isinstance(outcome, Failure) or not path.exists():
            return outcome
        payload = from_bytes(path.read_bytes())
        path.unlink()
        return replace(outcome, payload=payload)

    def _file(self, client: str) -> Path:
        return Path(self._scratch.name, str(self._position[client]))


class SynchronousRounds:
    """All clients that are sampled for a round, behind one barrier.

    With a virtual deadline an update that takes longer is dropped, and such a round ends at the deadline.

    Args:
        folder: where updates that arrive early wait for their turn.
    """

    def __init__(self, dispatcher: Dispatcher, schedule: Schedule, folder: Path) -> None:
        self._dispatcher, self._schedule, self._folder = dispatcher, schedule, folder
        self._virtual = dispatcher.virtual_time
        self.now = None if self._virtual is None else 0.0
        #: Real seconds from the round's start in which lost clients get the work again, if it is below quorum.
        self._waits = 0.0
        if not dispatcher.runtime.capabilities.virtual:
            self._waits = schedule.federation.round_deadline or 0.0
        self._round, self._began = 0, 0.0
        self._clients: tuple[str, ...] = ()
        self._arrived: dict[str, float] = {}  # client → when its outcome of this round was there, in virtual seconds

    def begin(self, round: int) -> list[str]:
        self._round, self._clients, self._arrived = round, self._schedule.sample(round), {}
        self._began = self.now or 0.0
        return list(self._clients)

    def updates(self, accept: Accept) -> Iterator[Update]:
        accepted, fewest = 0, self._schedule.federation.min_clients
        with ClientOrder(self._clients, self._folder) as order:
            for outcome in chain(self._outcomes(), (None,)):
                over = outcome is None
                if outcome is not None:
                    order.add(outcome if self._virtual is None else self._in_time(outcome))
                del outcome
                while (ready := order.next(over)) is not None:
                    update = accept(ready)
                    del ready
                    if update is not None:
                        accepted += 1
                        yield update
                    del update  # what was aggregated is let go of before the next one is decoded
        if accepted < fewest:
            raise below_quorum(self._round, accepted, fewest)

    def about(self, outcome: Update) -> dict[str, Any]:
        arrived = None if self._virtual is None else round(self._arrived[outcome.client], 3)
        return {"staleness": 0, "arrived": arrived}

    def notes(self) -> dict[str, Any]:
        return {"now": self.now}

    def files(self) -> dict[str, Path]:
        return {}

    def load(self, notes: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        self.now = None if self._virtual is None else notes["now"]

    def close(self) -> None:
        pass

    def _in_time(self, outcome: Outcome) -> Outcome:
        """The outcome as the virtual deadline leaves it. Times count from the end of the round before."""
        assert self._virtual is not None
        seconds, deadline = self._virtual.took(outcome.client), self._virtual.deadline
        if deadline is not None and seconds > deadline:
            detail = f"{seconds:.4g} virtual seconds, and devices.deadline is {deadline:g}"
            outcome = Failure(outcome.client, outcome.round, "too_late", detail, outcome.cost)
            seconds = deadline
        self._arrived[outcome.client] = self._began + seconds
        self.now = max(self.now or 0.0, self._began + seconds)
        return outcome

    def _outcomes(self) -> Iterator[Outcome]:
        """Outcomes of the round. Below quorum, clients that were lost get the work again until the round's real deadline.

        Clients whose simulated devices vanished get it again too, which takes no time; failures are reported after that.
        """
        virtual, fewest = self._virtual, self._schedule.federation.min_clients
        again = LOST_STATE if virtual is None else VANISHED
        until, usable, attempts = time.monotonic() + self._waits, 0, 0
        asked: Sequence[str] = self._clients
        while True:
            lost: list[Failure] = []
            for outcome in self._dispatcher.outcomes("train", self._round, asked):
                if isinstance(outcome, Failure) and outcome.reason in again and usable < fewest:
                    lost.append(outcome)
                    continue
                usable += isinstance(outcome, Update)
                if usable >= fewest:  # no retry is needed, and no later client has to wait for it
                    yield from lost
                    lost = []
                yield outcome
                del outcome
            attempts += 1
            over = time.monotonic() + PAUSE > until if virtual is None else attempts == ATTEMPTS
            if not lost or over:
                yield from lost
                return
            if virtual is None:
                for failure in lost if asked is self._clients else ():  # reported once, and again if it stays lost
                    self._dispatcher.failed(failure, "train")
                time.sleep(PAUSE)
            asked = [f.client for f in lost]
