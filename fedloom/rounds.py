"""When clients train and when they are measured (`Schedule`), and how far a run has come (`Progress`).

Both are plain data with a little arithmetic: they do not send, train or measure anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fedloom.config import FederationConfig
from fedloom.errors import RunFailed
from fedloom.randomness import numpy_generator, secret_uniform
from fedloom.types import Cost

#: How often a simulated server looks whether clients are there, or asks those again that vanished, before it gives up.
ATTEMPTS = 1000


@dataclass(frozen=True)
class Schedule:
    """When and with whom.

    Attributes:
        training: clients that can be sampled, in order.
        testing: clients that hold test data, in order.
        steps: optimiser steps of an assignment, None where clients count epochs.
        every: evaluate after every k rounds; 0 only before and after.
        independent: every client takes part with probability sampled()/len(training), whatever the others do (Poisson
            sampling), so that a round may have no client at all; otherwise exactly sampled() of them.
        secret: the sample comes from the operating system's entropy and not from the seed.
        there: (round, attempt) → the clients that can be reached as it begins, or when the server looks again; None where
            all always can.
        measured: those of `testing` that evaluations measure, in order; None is all of them.
    """

    training: tuple[str, ...]
    testing: tuple[str, ...]
    federation: FederationConfig
    steps: int | None
    every: int
    seed: int
    independent: bool = False
    secret: bool = False
    measured: tuple[str, ...] | None = None
    there: Callable[[int, int], frozenset[str]] | None = None

    @property
    def measuring(self) -> tuple[str, ...]:
        """The clients of an evaluation."""
        return self.testing if self.measured is None else self.measured

    def sampled(self) -> int:
        """Clients in a round, on average where they are sampled independently."""
        return self.federation.sampled(len(self.training))

    def sample(self, round: int) -> tuple[str, ...]:
        """The clients of one round, in their fixed order."""
        count, pool = self.sampled(), self._reachable(round, self.federation.min_clients)
        if count >= len(pool):
            return pool
        if self.independent:
            numbers = self._numbers(round)
            return tuple(c for c, u in zip(self.training, numbers, strict=True) if u <= count / len(self.training))
        rng = numpy_generator(self.seed, "sample", round)
        return tuple(pool[i] for i in sorted(rng.choice(len(pool), count, replace=False)))

    def queue(self, round: int, fewest: int = 0) -> tuple[str, ...]:
        """All clients that can be sampled, `fewest` at least, in the order in which an asynchronous round asks them."""
        pool = self._reachable(round, fewest)
        order = numpy_generator(self.seed, "sample", round).permutation(len(pool))
        return tuple(pool[i] for i in order)

    def _reachable(self, round: int, fewest: int) -> tuple[str, ...]:
        """Who is there; where those are fewer than `fewest`, the server looks again, ATTEMPTS times. Raises RunFailed."""
        if self.there is None:
            return self.training
        for attempt in range(ATTEMPTS):
            there = self.there(round, attempt)
            found = tuple(client for client in self.training if client in there)
            if len(found) >= fewest:
                return found
        raise RunFailed(
            f"{ATTEMPTS} times in a row fewer than {fewest} of {len(self.training)} clients were there for round {round}: "
            "raise devices.available, or lower federation.min_clients"
        )

    def _numbers(self, round: int) -> np.ndarray:
        """One for each client, uniform in (0, 1]."""
        if self.secret:
            return secret_uniform(len(self.training))
        return 1.0 - numpy_generator(self.seed, "sample", round).random(len(self.training))

    def evaluates(self, finished: int) -> bool:
        """Whether an evaluation belongs after `finished` rounds."""
        if finished in (0, self.federation.rounds):
            return True
        return self.every > 0 and finished % self.every == 0


@dataclass
class Progress:
    """The coordinator's own notes, part of every checkpoint.

    Attributes:
        finished: rounds finished.
        cost: of all messages and work, evaluation included.
        evaluation_cost: the part of it that evaluation took.
        evaluations: rounds finished → what was measured then.
        failures, skipped_steps: counted over the run.
        stopped: the round, the hook and the sentence of a run that a hook ended before its last round.
        earlier: (wall, CPU) seconds of the sessions before this one.
    """

    finished: int = 0
    cost: Cost = Cost()
    evaluation_cost: Cost = Cost()
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: int = 0
    skipped_steps: int = 0
    stopped: dict[str, Any] | None = None
    earlier: tuple[float, float] = (0.0, 0.0)
    _started: tuple[float, float] = field(default_factory=lambda: (time.perf_counter(), time.process_time()))

    def elapsed(self) -> tuple[float, float]:
        """(wall, CPU) seconds of the run so far, all sessions that left a checkpoint together."""
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        return self.earlier[0] + wall, self.earlier[1] + cpu

    def notes(self) -> dict[str, Any]:
        return {
            "cost": asdict(self.cost),
            "evaluation_cost": asdict(self.evaluation_cost),
            "evaluations": {str(k): v for k, v in self.evaluations.items()},
            "failures": self.failures,
            "skipped_steps": self.skipped_steps,
            "stopped": self.stopped,
            "elapsed": list(self.elapsed()),
        }

    @classmethod
    def from_notes(cls, finished: int, notes: Mapping[str, Any]) -> Progress:
        return cls(
            finished,
            Cost(**notes["cost"]),
            Cost(**notes["evaluation_cost"]),
            {int(k): v for k, v in notes["evaluations"].items()},
            notes["failures"],
            notes["skipped_steps"],
            notes["stopped"],
            (notes["elapsed"][0], notes["elapsed"][1]),
        )
