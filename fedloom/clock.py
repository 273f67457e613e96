"""Virtual time: how long a client's work would have taken, where a simulator does it at once.

Only an order of arrival and a time axis come from here; no number that is trained does. This file does not know who
runs when.
"""

from __future__ import annotations

import math
from typing import Protocol

from fedloom.randomness import numpy_generator
from fedloom.types import Cost

#: Of a client of median speed. The unit is arbitrary: only ratios between clients decide who arrives first.
SECONDS_PER_TOKEN = 1e-3


class Clock(Protocol):
    """Says how long an assignment takes, from when it is sent to when its outcome arrives."""

    def seconds(self, client: str, round: int, cost: Cost) -> float:
        """Virtual seconds, 0 or more, of what `client` did in `round` at this `cost`.

        A resumed run must hear the same, so the answer may come from tokens, operations and steps, but neither from
        measured seconds nor from bytes: a message's length varies with the times that are written in it.
        """
        ...


class Speeds:
    """Time is tokens × seconds for a token; each client has a speed of its own, drawn once from a log-normal.

    A failure costs no tokens, so it arrives at the moment at which its work was sent.

    Args:
        spread: σ of the logarithm; 0 makes all clients equally fast, at 0.5 two in three lie within a factor of 1.65
            of the median.
    """

    def __init__(self, seed: int, spread: float) -> None:
        self._seed = seed
        self._spread = spread

    def seconds(self, client: str, round: int, cost: Cost) -> float:
        z = float(numpy_generator(self._seed, "arrival", 0, client).standard_normal())
        return cost.train_tokens * SECONDS_PER_TOKEN * math.exp(self._spread * z)
