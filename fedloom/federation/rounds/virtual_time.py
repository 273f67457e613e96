"""Virtual time: how long a client's work would have taken, where a simulator does it at once.

A `Pace` says how long work takes, `Timed` asks it about everything that a runtime carries, and whoever gathers a round
(synchronous.py, asynchronous.py) turns seconds into arrivals. There is no other clock. No number that is trained
comes from here; which updates count, and in which order, does. This file does not know who runs when.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from fedloom.common.randomness import numpy_generator
from fedloom.messages.types import Assignment, Cost, Failure, Outcome, Payload

#: Of a client of median speed. The unit is arbitrary: only ratios between clients decide who arrives first.
SECONDS_PER_TOKEN = 1e-3


class Pace(Protocol):
    """How long clients' work takes, and who is lost in the middle of it."""

    @property
    def deadline(self) -> float | None:
        """Virtual seconds that a synchronous round waits for a client; None is as long as it takes."""
        ...

    def seconds(self, client: str, cost: Cost, down: int, up: int) -> float:
        """Virtual seconds, 0 or more, from when work is sent to when its update arrives.

        A resumed run must hear the same, so the answer may come from tokens, operations and steps, but not from
        measured seconds, nor from a message's length, which varies with the times and the recipe that are written in it.

        Args:
            down, up: bytes of the encoded tensors in each direction.
        """
        ...

    def vanishes(self, client: str, round: int, attempt: int) -> bool:
        """Whether this client is lost in the middle of this round's work; `attempt`: how often it has been in this round."""
        ...


class Speeds:
    """Time is tokens × seconds for a token; each client has a speed of its own, drawn once from a log-normal.

    Args:
        spread: σ of the logarithm; 0 makes all clients equally fast, at 0.5 two in three lie within a factor of 1.65
            of the median.
    """

    deadline = None

    def __init__(self, seed: int, spread: float) -> None:
        self._seed = seed
        self._spread = spread

    def seconds(self, client: str, cost: Cost, down: int, up: int) -> float:
        z = float(numpy_generator(self._seed, "arrival", 0, client).standard_normal())
        return cost.train_tokens * SECONDS_PER_TOKEN * math.exp(self._spread * z)

    def vanishes(self, client: str, round: int, attempt: int) -> bool:
        return False


class Timed:
    """A runtime in virtual time, around one that does the work at once. Only training takes time.

    A failure is there at the moment at which its work was sent. A client that vanishes is sent nothing, and the server
    hears of it.
    """

    virtual = True

    def __init__(self, runtime: Any, pace: Pace) -> None:
        self._runtime = runtime
        self._pace = pace
        self._took: dict[str, float] = {}  # client → virtual seconds of its training that was handed over last
        self._vanished: Counter[tuple[str, int]] = Counter()  # (client, round) → how often

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self._runtime.clients)

    @property
    def pooled_tests(self) -> bool:
        return bool(self._runtime.pooled_tests)

    @property
    def deadline(self) -> float | None:
        return self._pace.deadline

    def took(self, client: str) -> float:
        """Virtual seconds of the training whose outcome this client handed over last."""
        return self._took.pop(client)

    def run(self, assignments: Iterable[Assignment | None]) -> Iterator[Outcome]:
        pending, lost, down = iter(assignments), list[Failure](), dict[str, int]()

        def up_to_the_next_lost() -> Iterator[Assignment | None]:
            for a in pending:
                if a is not None and a.kind == "train":
                    if self._pace.vanishes(a.client, a.round, self._vanished[a.client, a.round]):
                        self._vanished[a.client, a.round] += 1
                        detail = "its device was lost in the middle of the work"
                        lost.append(Failure(a.client, a.round, "vanished", detail))
                        return
                    down[a.client] = tensor_bytes(a.payload)
                yield a

        while True:
            for outcome in self._runtime.run(up_to_the_next_lost()):
                if outcome.client in down:
                    self._took[outcome.client] = self._seconds(outcome, down.pop(outcome.client))
                yield outcome
                del outcome  # nobody holds on to what was handed over
            if not lost:
                return
            gone = lost.pop()
            self._took[gone.client] = 0.0
            yield gone

    def close(self) -> None:
        self._runtime.close()

    def _seconds(self, outcome: Outcome, down: int) -> float:
        if isinstance(outcome, Failure):
            return 0.0
        return self._pace.seconds(outcome.client, outcome.cost, down, tensor_bytes(outcome.payload))


def tensor_bytes(payload: Payload) -> int:
    """Of a payload's tensors as operators left them."""
    return sum(t.numel() * t.element_size() for t in payload.tensors.values())
