"""Simulate clients on several GPUs or machines of one owner: Ray's actors do the work, each with the base loaded once.

    this process   assignments ─ as messages ─▶ object store: a round's payload once ─▶ actor 1 … actor N: Host
                   outcomes    ◀────────────────────────── as messages, as they come ◀──┘

`Host` is in ray_host.py. A free actor takes the next assignment. Clients' state is stored in the run folder, as in the
simulator, and travels with the work. So any actor can do any work, and the result equals the simulator's bit for bit.

    crashed  the actor ended; another is started, and the client takes part again in the next round
    late     not done within federation.round_deadline; the actor is ended, and another is started

Ray pickles what it moves and runs what it receives, by design. So it is only for machines of one owner
(docs/architecture.md). This file does not know any algorithm. Only `_start` uses private parts of Ray.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from fedloom.common.errors import RunFailed, UserError
from fedloom.common.files import folder_name, write_bytes
from fedloom.data.federated import FederatedData
from fedloom.federation.client import Client
from fedloom.federation.record.checkpoints import ClientStore
from fedloom.federation.runtime import Capabilities, Runtime
from fedloom.messages import wire
from fedloom.messages.types import Assignment, Failure, Outcome
from fedloom.recipe.recipe import RayConfig, Recipe
from fedloom.runtimes import versions
from fedloom.runtimes.ray_host import Done, Host, Opened, Orders

log = logging.getLogger(__name__)

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported: stops its usage reports


#: Seconds that an actor has to start and load the base.
START = 600.0


#: How often an actor is started if it ends before it is open.
TRIES = 3


#: What Ray raises if an actor, or an object that it made, is lost.
GONE = (RayActorError, OutOfMemoryError, WorkerCrashedError, ObjectLostError)


@dataclass
class Actor:
    """One process. `opening` is None once it is open; `tries` counts the starts until then."""

    number: int
    handle: Any
    opening: Any
    since: float
    tries: int = 1
    busy: bool = False


@dataclass(frozen=True)
class Job:
    """Work in progress: its actor, its assignment, the bytes sent, and the queue for its outcome."""

    actor: Actor
    assignment: Assignment
    sent: int
    since: float
    outbox: deque[Outcome]


class Ray(Runtime):
    """The runtime `ray`. Attributes:

    puts: the number of payloads that were put into the object store.
    """

    capabilities = Capabilities(virtual=True, pooled_tests=True, keeps_clients=False)

    def __init__(
        self, orders: Orders, settings: RayConfig, folder: Path, keep: int, deadline: float | None, own: Own
    ) -> None:
        self.puts = 0
        self._settings, self._deadline, self._own = settings, deadline, own
        self._clients = orders.data.partition.clients
        self._store = ClientStore(folder / "clients", keep)
        self._results = folder / "adapters"
        self._orders = ray.put(orders)
        self._last: tuple[np.ndarray, Any] | None = None
        self._jobs: dict[Any, Job] = {}
        self._actors = [self._started(number) for number in range(settings.actors)]
        while any(actor.opening is not None for actor in self._actors):
            self._wait()

    @classmethod
    def open(cls, recipe: Recipe, data: FederatedData, folder: Path, client: Callable[[], Client]) -> Ray:
        """Start the actors. Raises UserError if Ray has too few CPUs or GPUs for them."""
        settings = recipe.runtime.ray
        if recipe.runtime.device.startswith("cuda:"):
            raise UserError(
                f"runtime.device={recipe.runtime.device} under runtime.name=ray, which gives each actor GPUs of its own: "
                "use runtime.device=cuda with runtime.ray.gpus"
            )
        own = _start(settings)
        try:
            _check(settings)
            log.info(f"starting {settings.actors} Ray actors, each of which loads the base model")
            orders = Orders(recipe.resolved(), data, max(1, int(settings.cpus)))
            keep = recipe.tracking.keep_checkpoints + 1
            return cls(orders, settings, folder, keep, recipe.federation.round_deadline, own)
        except BaseException:
            own.close()
            raise

    @property
    def clients(self) -> tuple[str, ...]:
        return self._clients

    def run(self, assignments: Iterable[Assignment | None]) -> Iterator[Outcome]:
        """Yield one outcome for each assignment, as they arrive. Each actor does one piece of work at a time."""
        source, exhausted, under_way = iter(assignments), False, 0
        outbox: deque[Outcome] = deque()
        while True:
            none_yet = False
            while not (exhausted or none_yet) and (actor := self._idle()):
                assignment = next(source, _END)
                if isinstance(assignment, Assignment):
                    self._send(actor, assignment, outbox)
                    under_way += 1
                exhausted, none_yet = assignment is _END, assignment is None
            if not outbox:
                if not under_way and (exhausted or none_yet):
                    return
                self._wait()
            while outbox:
                under_way -= 1
                yield outbox.popleft()

    def close(self) -> None:
        for actor in self._actors:
            self._let_go(actor)
        self._actors, self._jobs, self._last = [], {}, None
        self._own.close()

    # ------------------------------------------------------------------ work

    def _idle(self) -> Actor | None:
        return next((actor for actor in self._actors if actor.opening is None and not actor.busy), None)

    def _send(self, actor: Actor, assignment: Assignment, outbox: deque[Outcome]) -> None:
        message = wire.split(wire.encode_assignment(assignment))
        up_to = assignment.round - 1 if assignment.kind == "train" else assignment.round
        state = self._store.get(assignment.client, up_to)
        actor.busy = True
        ref = actor.handle.work.remote(message.start, self._shared(message.body), message.digest, state)
        self._jobs[ref] = Job(actor, assignment, message.total, time.monotonic(), outbox)

    def _shared(self, body: memoryview) -> Any:
        """Put the body into the object store, once while consecutive clients receive the same body."""
        array = np.frombuffer(body, np.uint8)
        if self._last is None or not np.array_equal(self._last[0], array):
            self._last = array, ray.put(array)
            self.puts += 1
        return self._last[1]

    def _wait(self) -> None:
        """Wait until an outcome arrives, an actor is open, or a deadline is over."""
        openings = {actor.opening: actor for actor in self._actors if actor.opening is not None}
        if not openings and not self._actors:
            raise RunFailed(f"no Ray actor could be started again ({TRIES} tries each): finished rounds are kept")
        until = [actor.since + START for actor in openings.values()]
        if self._deadline is not None:
            until += [job.since + self._deadline for job in self._jobs.values()]
        timeout = max(0.0, min(until) - time.monotonic()) if until else None
        done, _ = ray.wait([*self._jobs, *openings], num_returns=1, timeout=timeout)
        for ref in done:
            if ref in openings:
                self._open(openings[ref])
            else:
                self._finish(ref)
        if not done:
            self._call_off(time.monotonic())

    def _finish(self, ref: Any) -> None:
        job = self._jobs.pop(ref)
        try:
            done: Done = ray.get(ref)
        except GONE as error:
            self._give_up(
                job, "crashed", f"actor {job.actor.number} ended ({type(error).__name__}); another is started"
            )
            return
        job.actor.busy = False
        client, message = job.assignment.client, done.message()
        outcome = wire.decode_outcome(message)
        if done.state is not None:
            self._store.put(client, outcome.round, done.state)
        for name, data in done.files.items():
            write_bytes(self._results / folder_name(client) / name, data)
        cost = replace(outcome.cost, upload_bytes=message.total, download_bytes=job.sent)
        job.outbox.append(replace(outcome, cost=cost))

    def _call_off(self, now: float) -> None:
        """End the actors whose work is late, and those that do not start."""
        for ref, job in [*self._jobs.items()]:
            if self._deadline is not None and now >= job.since + self._deadline:
                del self._jobs[ref]
                self._give_up(job, "late", f"not done within {self._deadline:g} seconds (federation.round_deadline)")
        for actor in [a for a in self._actors if a.opening is not None and now >= a.since + START]:
            self._again(actor, f"is not open after {START:g} seconds")

    def _give_up(self, job: Job, reason: str, detail: str) -> None:
        job.outbox.append(Failure(job.assignment.client, job.assignment.round, reason, detail))
        self._replace(job.actor, tries=1)

    # ------------------------------------------------------------------ actors

    def _process(self) -> Any:
        options: dict[str, Any] = {"num_cpus": self._settings.cpus, "num_gpus": self._settings.gpus}
        return ray.remote(Host).options(max_restarts=0, scheduling_strategy="SPREAD", **options).remote()

    def _let_go(self, actor: Actor) -> None:
        if actor.opening is None and not actor.busy:
            with contextlib.suppress(GetTimeoutError, *GONE):
                ray.get(actor.handle.close.remote(), timeout=5.0)
        ray.kill(actor.handle)

    def _started(self, number: int, tries: int = 1) -> Actor:
        handle = self._process()
        return Actor(number, handle, handle.open.remote(self._orders), time.monotonic(), tries)

    def _replace(self, actor: Actor, tries: int) -> None:
        ray.kill(actor.handle)
        self._actors[self._actors.index(actor)] = self._started(actor.number, tries)

    def _open(self, actor: Actor) -> None:
        try:
            opened: Opened = ray.get(actor.opening)
        except GONE as error:
            last = str(error).strip().splitlines()[-1].strip()
            self._again(actor, f"ended while it started ({type(error).__name__}: {last})")
            return
        differs = versions.mismatch(versions.own(), opened.versions)
        trouble = opened.trouble or (differs and f"{differs}: install the same versions on all machines")
        if trouble:
            raise UserError(f"a Ray actor cannot work: {trouble}")
        if opened.late_settings:
            log.warning(f"a Ray actor imported torch too early for {', '.join(opened.late_settings)}: bits may differ")
        actor.opening, actor.tries = None, 1

    def _again(self, actor: Actor, what: str) -> None:
        log.warning(f"Ray actor {actor.number} {what}")
        if actor.tries < TRIES:
            self._replace(actor, actor.tries + 1)
            return
        ray.kill(actor.handle)
        self._actors.remove(actor)


_END = object()


@dataclass
class Own:
    """The part of Ray that this process has to end: `folder` has its files; None: nothing to end."""

    folder: Path | None = None

    def close(self) -> None:
        if self.folder is not None:
            ray.shutdown()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def _start(settings: RayConfig) -> Own:
    """Connect to a Ray that runs, or start one for this process: on loopback, without output or dashboard."""
    from ray._private import ray_constants, ray_logging

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    folder = None
    if ray.is_initialized():
        return Own()
    if settings.address is not None:
        try:
            ray.init(address=settings.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"runtime.ray.address={settings.address}: no Ray answers there ({first}): check it, or leave it out"
            ) from error
        folder = Path(tempfile.mkdtemp(prefix="fedloom-ray-"))
    else:
        ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's own switch to listen only on loopback
        folder = Path(tempfile.mkdtemp(prefix="fedloom-ray-"))  # a short path, because its sockets are there
        ray.init(
            num_cpus=math.ceil(settings.actors * settings.cpus),
            num_gpus=torch.cuda.device_count(),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
            **quiet,
        )
    ray_logging.global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")  # this file reports a dead actor
    return Own(folder)


def _check(settings: RayConfig) -> None:
    """Raise UserError if Ray can never place all actors."""
    there = ray.cluster_resources()
    for key, name, each in (("CPU", "cpus", settings.cpus), ("GPU", "gpus", settings.gpus)):
        found = there.get(key, 0.0)
        if settings.actors * each > found + 1e-9:
            wanted = settings.actors * each
            raise UserError(
                f"runtime.ray.actors={settings.actors} with runtime.ray.{name}={each:g} need {wanted:g} {key}s together, "
                f"but Ray has {found:g}: ask for fewer actors or fewer {name}"
            )
