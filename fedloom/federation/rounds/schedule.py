"""When clients train and when they are measured (`Schedule`), and how far a run has come (`Progress`).

Both are plain data with a little arithmetic: they do not send, train or measure anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedloom.algorithms.base import Algorithm
from fedloom.common.errors import RunFailed
from fedloom.common.randomness import numpy_generator, secret_uniform
from fedloom.data.corpus import Partition
from fedloom.data.federated import measured_clients
from fedloom.recipe.privacy import PrivacyConfig
from fedloom.recipe.recipe import FederationConfig, Recipe


def make_schedule(recipe: Recipe, algorithm: Algorithm, clients: Partition) -> Schedule:
    """Say who trains when, and who is measured. Under a pooled baseline one client takes everybody's steps.

    Too few clients are refused by federation/checks/, before. Raises UserError for more measured clients than there are.
    """
    federation = recipe.federation
    training = clients.training_clients
    schedule = Schedule(
        training, clients.testing_clients, federation, recipe.train.steps, recipe.evaluation.every, recipe.seed,
        measured=measured_clients(recipe, clients),
    )  # fmt: skip
    if recipe.privacy is not None:
        return _private_schedule(schedule, recipe.privacy)
    if not algorithm.properties.pooled:
        return schedule
    alone = federation.model_copy(update={"clients_per_round": None, "min_clients": 1})
    steps = recipe.train.steps * schedule.sampled() if recipe.train.steps else None
    return replace(schedule, training=clients.pooled().training_clients, federation=alone, steps=steps)


def _private_schedule(schedule: Schedule, privacy: PrivacyConfig) -> Schedule:
    """Sampling as the accountant counts it: independently, where a trusted server hides who was sampled.

    A round without any client is a round, of noise alone: ending the run there would tell who was not in it.
    """
    schedule = replace(schedule, sampling=Sampling(secret=not privacy.seeded))
    if privacy.where == "client" or schedule.sampled() == len(schedule.training):
        return schedule
    federation = schedule.federation
    sampling = replace(schedule.sampling, independent=True)
    return replace(schedule, sampling=sampling, federation=federation.model_copy(update={"min_clients": 0}))


#: The most attempts of a simulated server to find available clients, or to repeat work of clients that vanished.
ATTEMPTS = 1000


@dataclass(frozen=True)
class Sampling:
    """How a round's clients are drawn; by default exactly `sampled()` of all, from the seed.

    Attributes:
        independent: every client takes part with probability sampled()/len(training), whatever the others do (Poisson
            sampling), so that a round may have no client at all; otherwise exactly sampled() of them.
        secret: the sample comes from the operating system's entropy and not from the seed.
        there: (round, attempt) → the clients that can be reached as it begins, or when the server looks again; None where
            all always can.
    """

    independent: bool = False
    secret: bool = False
    there: Callable[[int, int], frozenset[str]] | None = None


@dataclass(frozen=True)
class Schedule:
    """Which clients train and which are evaluated, and when.

    Attributes:
        training: clients that can be sampled, in order.
        testing: clients that have test data, in order.
        steps: optimiser steps of an assignment, None where clients count epochs.
        every: evaluate after every k rounds; 0 only before and after.
        measured: those of `testing` that evaluations measure, in order; None is all of them.
    """

    training: tuple[str, ...]
    testing: tuple[str, ...]
    federation: FederationConfig
    steps: int | None
    every: int
    seed: int
    measured: tuple[str, ...] | None = None
    sampling: Sampling = Sampling()

    @property
    def measuring(self) -> tuple[str, ...]:
        """The clients of an evaluation."""
        return self.testing if self.measured is None else self.measured

    def sampled(self) -> int:
        """Clients in a round, on average where they are sampled independently."""
        return self._sampled

    @cached_property
    def _sampled(self) -> int:
        return self.federation.sampled(len(self.training))

    def sample(self, round: int) -> tuple[str, ...]:
        """The clients of one round, in their fixed order."""
        count, pool = self.sampled(), self._reachable(round, self.federation.min_clients)
        if count >= len(pool):
            return pool
        if self.sampling.independent:
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
        if self.sampling.there is None:
            return self.training
        for attempt in range(ATTEMPTS):
            there = self.sampling.there(round, attempt)
            found = tuple(client for client in self.training if client in there)
            if len(found) >= fewest:
                return found
        raise RunFailed(
            f"{ATTEMPTS} times in a row fewer than {fewest} of {len(self.training)} clients were there for round {round}: "
            "raise devices.available, or lower federation.min_clients"
        )

    def _numbers(self, round: int) -> np.ndarray:
        """One for each client, uniform in (0, 1]."""
        if self.sampling.secret:
            return secret_uniform(len(self.training))
        return 1.0 - numpy_generator(self.seed, "sample", round).random(len(self.training))

    def evaluates(self, finished: int) -> bool:
        """Whether an evaluation belongs after `finished` rounds."""
        if finished in (0, self.federation.rounds):
            return True
        return self.every > 0 and finished % self.every == 0
