"""How the updates of a round come together, and when in virtual time: `Gathering`, and its synchronous way, `AtOnce`.

    sample clients → ask them all → those that were lost, again → those that are late, dropped → in client order

The asynchronous way is asynchronous.py. This file knows no algorithm and no message.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.federation.rounds.collection import Accept, in_order
from fedloom.federation.rounds.dispatcher import Sender
from fedloom.federation.rounds.schedule import ATTEMPTS, Schedule
from fedloom.federation.rounds.virtual_time import Timed
from fedloom.messages.types import STARTED_ANEW, VANISHED, Failure, Outcome, Update

#: Seconds between two times that a lost client is asked whether it is back, where a round is below quorum.
PAUSE = 1.0


class AtOnce:
    """All clients that are sampled for a round, behind one barrier: the round ends with the last of them.

    Args:
        timed: the runtime, where time is virtual. With its deadline an update that takes longer is dropped, and such a
            round ends at the deadline.
        waits: real seconds from the round's start in which lost clients are asked again, where it is below quorum.
        folder: where updates that arrive early wait for their turn.
    """

    def __init__(
        self,
        sender: Sender,
        schedule: Schedule,
        timed: Timed | None,
        waits: float,
        folder: Path,
    ) -> None:
        self.now = None if timed is None else 0.0
        self._sender, self._schedule = sender, schedule
        self._timed, self._waits, self._folder = timed, waits, folder
        self._round = 0
        self._clients: tuple[str, ...] = ()
        self._arrived: dict[str, float] = {}  # client → when its outcome of this round was there, in virtual seconds

    def begin(self, round: int) -> list[str]:
        self._round, self._clients, self._arrived = round, self._schedule.sample(round), {}
        return list(self._clients)

    def gather(self, accepted: Accept) -> Iterator[Update]:
        outcomes = self._insisted() if self._timed is None else self._in_time(self._insisted(), self._timed)
        return accepted(in_order(outcomes, self._clients, self._folder))

    def about(self, outcome: Update) -> dict[str, Any]:
        return {"staleness": 0, "arrived": round(self._arrived[outcome.client], 3) if self._timed else None}

    def notes(self) -> dict[str, Any]:
        return {"now": self.now}

    def files(self) -> dict[str, Path]:
        return {}

    def load(self, notes: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        self.now = notes["now"] if self._timed else None

    def close(self) -> None:
        pass

    def _in_time(self, outcomes: Iterator[Outcome], timed: Timed) -> Iterator[Outcome]:
        """Outcomes as the virtual deadline leaves them. Times count from the end of the round before."""
        began, deadline = self.now or 0.0, timed.deadline
        self.now = began
        for outcome in outcomes:
            seconds = timed.took(outcome.client)
            if deadline is not None and seconds > deadline:
                detail = f"{seconds:.4g} virtual seconds, and devices.deadline is {deadline:g}"
                outcome = Failure(outcome.client, outcome.round, "too_late", detail, outcome.cost)
                seconds = deadline
            self._arrived[outcome.client] = began + seconds
            self.now = max(self.now, began + seconds)
            yield outcome
            del outcome

    def _insisted(self) -> Iterator[Outcome]:
        """Outcomes of a round. Below quorum, clients that were lost are asked again until the round's real deadline.

        Those whose simulated devices vanished are asked again too, which takes no time; what comes of it is said then.
        """
        fewest, again = self._schedule.federation.min_clients, STARTED_ANEW if self._timed is None else VANISHED
        until, usable, attempts = time.monotonic() + self._waits, 0, 0
        asked: Sequence[str] = self._clients
        while True:
            lost: list[Failure] = []
            for outcome in self._sender.outcomes("train", self._round, asked):
                if isinstance(outcome, Failure) and outcome.reason in again and usable < fewest:
                    lost.append(outcome)
                    continue
                usable += isinstance(outcome, Update)
                if usable >= fewest:  # nobody is asked again, and nobody behind them has to wait for it
                    yield from lost
                    lost = []
                yield outcome
                del outcome
            attempts += 1
            over = time.monotonic() + PAUSE > until if self._timed is None else attempts == ATTEMPTS
            if not lost or over:
                yield from lost
                return
            if self._timed is None:
                for failure in lost if asked is self._clients else ():  # said once, and again where it stays lost
                    self._sender.failed(failure, "train")
                time.sleep(PAUSE)
            asked = [f.client for f in lost]
