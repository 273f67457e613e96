"""Simulate all clients in one process, on one frozen base, one after another or several together.

The base model and one adapter buffer are in memory once. Local training begins by copying the client's payload into the
buffer. With `train.cohort`, several clients train in one pass over the base, each in a seat with its own buffer
(training/cohort.py). Messages are really encoded and decoded, so bytes are measured, and a payload that cannot be encoded
fails here too. Messages have no digest, because they never leave this process. The simulator knows no algorithm: one
`Client` acts as all clients, or one for each seat, or a trainer of several ranks does (runtimes/ranks/pool.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedloom.data.federated import FederatedData
from fedloom.federation.client import Client
from fedloom.federation.runtime import Capabilities, Runtime
from fedloom.messages import wire
from fedloom.messages.types import Assignment, Cost, Outcome
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.ranks.pool import Ranked
from fedloom.training.cohort import Cohort


class Simulator(Runtime):
    capabilities = Capabilities(virtual=True, pooled_tests=True, cohorts=True, ranks=True)

    def __init__(self, client: Client | Ranked, clients: tuple[str, ...]) -> None:
        self._client = client
        self._clients = clients
        self._recipe: Mapping[str, Any] | None = None
        self._size = 1
        self._cohort: Cohort | None = None
        self._seated: list[Client] = []  # one for each seat of the cohort, in the same order

    @classmethod
    def open(cls, recipe: Recipe, data: FederatedData, folder: Path, client: Callable[[], Client]) -> Simulator:
        return cls(Ranked(recipe, folder) if recipe.runtime.ranks > 1 else client(), data.partition.clients)

    @property
    def clients(self) -> tuple[str, ...]:
        return self._clients

    def run(self, assignments: Iterable[Assignment | None]) -> Iterator[Outcome]:
        for messages in self._sent(assignments):
            received = [wire.decode_assignment(message, sealed=False) for message in messages]
            outcomes = self._together(received) if len(received) > 1 else map(self._client.handle, received)
            for message, done in zip(messages, outcomes, strict=True):
                outcome = _replied(done, len(message))
                del message, done
                yield outcome
                del outcome

    def close(self) -> None:
        self._cohort, self._seated = None, []
        self._client.close()

    def _sent(self, assignments: Iterable[Assignment | None]) -> Iterator[list[bytes]]:
        """Encode assignments; yield those together whose clients train together."""
        waiting: list[bytes] = []
        for assignment in assignments:
            if assignment is None and not waiting:  # no work is ever in progress here
                return
            if assignment is not None:
                if assignment.recipe is not None and assignment.recipe is not self._recipe:
                    self._recipe = assignment.recipe
                    self._size = Recipe.parse(assignment.recipe).train.cohort_size
                waiting.append(wire.encode_assignment(assignment, sealed=False))
                if assignment.kind == "train" and len(waiting) < self._size:
                    continue
            yield waiting
            waiting = []
        if waiting:
            yield waiting

    def _together(self, assignments: Sequence[Assignment]) -> Iterable[Outcome]:
        """Train several clients in one cohort, or one after another if memory is too small for that."""
        assert self._recipe is not None
        assert isinstance(self._client, Client), "cohorts are refused with several ranks"
        if self._cohort is None or len(self._cohort.seats) != self._size:
            self._cohort = Cohort(self._client.live, self._size)
            self._seated = [self._client.beside(self._recipe, seat) for seat in self._cohort.seats]
        wall, cpu = time.perf_counter(), time.process_time()
        jobs = [partial(c.handle, a) for c, a in zip(self._seated, assignments, strict=False)]
        try:
            outcomes = self._cohort.run(jobs)
        except torch.OutOfMemoryError:
            return map(self._client.handle, assignments)
        return _shared(outcomes, time.perf_counter() - wall, time.process_time() - cpu)


def _replied(done: Outcome, sent: int) -> Outcome:
    """Encode and decode the outcome, and add the bytes of both messages.

    Args:
        sent: bytes of the assignment's message.
    """
    reply = wire.encode_outcome(done, sealed=False)
    outcome = wire.decode_outcome(reply, sealed=False)
    return replace(outcome, cost=replace(outcome.cost, upload_bytes=len(reply), download_bytes=sent))


def _shared(outcomes: Sequence[Outcome], wall: float, cpu: float) -> list[Outcome]:
    """Divide the cohort's time by the tokens that each client trained on. Each client's own timer counts all of them."""
    tokens = [outcome.cost.train_tokens for outcome in outcomes]
    shares = [n / sum(tokens) if any(tokens) else 1 / len(outcomes) for n in tokens]
    return [
        replace(outcome, cost=_part(outcome.cost, wall * share, cpu * share))
        for outcome, share in zip(outcomes, shares, strict=True)
    ]


def _part(cost: Cost, wall: float, cpu: float) -> Cost:
    """Replace the time in `cost`. A client that used a GPU is charged for all of that time."""
    return replace(cost, wall_seconds=wall, cpu_seconds=cpu, gpu_seconds=wall if cost.gpu_seconds else 0.0)
