"""Virtual time: how long a client's work would have taken, where a simulator does it at once.

A `Pace` says how long work takes, `VirtualTime` asks it about everything that the dispatcher sends, and the source of a
round's updates (synchronous.py, asynchronous.py) turns seconds into arrivals. There is no other clock. No number that is
trained comes from here; which updates count, and in which order, does. This file does not know who runs when.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

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


class VirtualTime:
    """Times the training that a runtime does at once. Only training takes time.

    A failure is there at the moment at which its work was sent. A client that vanishes is sent nothing, and the server
    gets a failure for it.

    Attributes:
        deadline: virtual seconds that a synchronous round waits for a client; None is as long as it takes.
    """

    def __init__(self, pace: Pace) -> None:
        self.deadline = pace.deadline
        self._pace = pace
        self._down: dict[str, int] = {}  # client → bytes of the tensors that are on their way to it
        self._took: dict[str, float] = {}  # client → virtual seconds of its training that was handed over last
        self._lost: list[Failure] = []
        self._vanished: Counter[tuple[str, int]] = Counter()  # (client, round) → how often

    def took(self, client: str) -> float:
        """Virtual seconds of the training whose outcome this client handed over last."""
        return self._took.pop(client)

    def until_lost(self, assignments: Iterator[Assignment | None]) -> Iterator[Assignment | None]:
        """The assignments up to the next one whose client vanishes, which is left out: `lost` has its failure then."""
        for a in assignments:
            if a is not None and a.kind == "train":
                if self._pace.vanishes(a.client, a.round, self._vanished[a.client, a.round]):
                    self._vanished[a.client, a.round] += 1
                    detail = "its device was lost in the middle of the work"
                    self._lost.append(Failure(a.client, a.round, "vanished", detail))
                    return
                self._down[a.client] = tensor_bytes(a.payload)
            yield a

    def lost(self) -> Failure | None:
        """The failure at which `until_lost` stopped, once; None where it came to its end."""
        if not self._lost:
            return None
        gone = self._lost.pop()
        self._took[gone.client] = 0.0
        return gone

    def note(self, outcome: Outcome) -> None:
        """Note how long this client's training took, as its outcome comes from the runtime."""
        down = self._down.pop(outcome.client, None)
        if down is None:
            return
        seconds = 0.0
        if not isinstance(outcome, Failure):
            seconds = self._pace.seconds(outcome.client, outcome.cost, down, tensor_bytes(outcome.payload))
        self._took[outcome.client] = seconds


def tensor_bytes(payload: Payload) -> int:
    """Of a payload's tensors as operators left them."""
    return sum(t.numel() * t.element_size() for t in payload.tensors.values())
