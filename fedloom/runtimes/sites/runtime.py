"""Clients at sites that do not trust each other's machines: one client for each site, reached by short requests.

A site works for minutes or hours and connections break, so no call waits for the whole work (exchange.py). A site that
died is noticed within seconds, although its work may take hours. A slow site has until the deadline.

    lost     it no longer answers, or its process was started again during the work
    crashed  its trainer died; the site has started it again
    late     not done within federation.round_deadline (or never started); the site stops the work
    absent   it was lost earlier and does not answer yet; nothing waits for it

Every answer of a site is checked before it is used: sizes before anything is allocated, then the message, then its client
and round. This file does not know the engine that carries a request (`Link`), nor any algorithm.
"""

from __future__ import annotations

import base64
import gc
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloom.common.errors import RunFailed
from fedloom.common.logs import same_hearers
from fedloom.federation.runtime import Capabilities, Runtime
from fedloom.messages import wire
from fedloom.messages.types import LOST_STATE, Assignment, Failure, Outcome
from fedloom.runtimes import versions
from fedloom.runtimes.sites.exchange import Exchange, GaveUp, Patience, Unprepared
from fedloom.runtimes.sites.link import Bytes, Link
from fedloom.runtimes.sites.outbox import Message, Outgoing

log = logging.getLogger(__name__)

#: A client's answer may have this many bytes plus four times its largest assignment.
SPARE_BYTES = 64 << 20


#: After these reasons, nothing waits for a site until it answers again.
LOST = {"lost", "absent"}


@dataclass
class Site:
    """The state of one site, as the server knows it.

    Attributes:
        prepared: whether it has the recipe.
        counted: whether its data are part of this job's run.
    """

    name: str
    client: str
    prepared: bool = False
    counted: bool = False
    dead_since: float | None = None
    sent_most: int = 0


class Distributed(Runtime):
    """The runtime between organisations. The engine's job builds it with its link; it is not opened by name.

    Args:
        link: the engine.
        sites: client → the name of its site.
        here: the sites that the engine's job reaches; others are absent until another job begins.
        leave: called before work is sent, with the lost sites and the times of loss (seconds since the epoch). True means
            that one of them is back but this job cannot reach it, so another job must continue the run.
        scratch: the folder for messages that wait on disk.
    """

    capabilities = Capabilities(ranks=True)

    def __init__(
        self,
        link: Link,
        sites: Mapping[str, str],
        here: Collection[str],
        patience: Patience,
        leave: Callable[[Mapping[str, float]], bool] = lambda dead: False,
        scratch: Path | None = None,
    ) -> None:
        self._link = link
        now = time.time()
        self._sites = {c: Site(s, c, dead_since=None if s in here else now) for c, s in sites.items()}
        self._patience = patience
        self._leave = leave
        self._outgoing = Outgoing(scratch)
        self._pool = ThreadPoolExecutor(
            max_workers=2 * max(1, len(sites)), thread_name_prefix="site", initializer=same_hearers()
        )
        self._exchange = Exchange(link, patience, self._pool.submit)
        self._orders: bytes = b""

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self._sites)

    # ------------------------------------------------------------------ before the first round

    def greet(
        self, recipe: Mapping[str, Any], run: str, files: Mapping[str, bytes] | None = None
    ) -> dict[str, dict[str, int]]:
        """Give every site the recipe; return client → counts of its data (train, validation, test, questions, tokens).

        A site that does not start, has other versions or rejects the recipe is left out, and a warning is logged.

        Args:
            files: files that sites cannot have themselves: name → bytes.
        """
        coded = {name: base64.b64encode(data).decode() for name, data in (files or {}).items()}
        orders = {"recipe": recipe, "run": run, "sites": len(self._sites), "files": coded}
        self._orders = json.dumps(orders, allow_nan=False).encode()
        present = [site for site in self._sites.values() if site.dead_since is None]
        self._await(present)
        futures = {self._pool.submit(self._prepare_twice, site): site for site in present}
        counts: dict[str, dict[str, int]] = {}
        for future, site in futures.items():
            try:
                counts[site.client] = future.result()
                site.counted = True
            except GaveUp as error:
                if error.reason in LOST:
                    site.dead_since = time.time()
                log.warning(f"{site.name} takes no part for now ({error.reason}): {error.detail}")
        return counts

    def _prepare_twice(self, site: Site) -> dict[str, int]:
        """Give a site the recipe; try again once if its trainer died while it loaded."""
        try:
            return self._prepare(site)
        except GaveUp as error:
            if error.reason not in LOST_STATE - {"absent"}:
                raise
            return self._prepare(site)

    def _await(self, waiting: list[Site]) -> None:
        """Wait until the sites' processes answer, at most `patience.start` seconds."""
        until = time.monotonic() + self._patience.start
        while waiting and time.monotonic() < until:
            asked = {site.name: self._pool.submit(self._ping, site) for site in waiting}
            waiting = [site for site in waiting if not asked[site.name].result()]
            if waiting:
                time.sleep(0.2)

    def _ping(self, site: Site) -> bool:
        return self._link.ask(site.name, {"verb": "hello", "versions": versions.own()}, b"", 2.0) is not None

    def _prepare(self, site: Site) -> dict[str, int]:
        answer = self._link.ask(
            site.name, {"verb": "hello", "versions": versions.own()}, b"", self._patience.answer
        )  # fmt: skip
        if answer is None:
            raise GaveUp("absent", "it gives no answer")
        told = answer.header.get("versions")
        differs = versions.mismatch(versions.own(), told if isinstance(told, dict) else {})
        if differs:
            raise GaveUp("version", f"{differs}: install the same versions at the site")
        reply = self._exchange.done(site.name, "prepare", Message(self._orders), limit=1 << 20)
        try:
            counts = json.loads(bytes(reply))
            found = {key: int(counts[key]) for key in ("train", "validation", "test", "questions", "tokens")}
        except (ValueError, KeyError, TypeError):
            raise GaveUp("bad_message", "its counts of its data cannot be read") from None
        if min(found.values()) < 0 or max(found.values()) > 1 << 40:
            raise GaveUp("bad_message", "its counts of its data are not possible")
        site.prepared = True
        self._mark(site, dead=False)
        return found

    # ------------------------------------------------------------------ work

    def run(self, assignments: Iterable[Assignment | None]) -> Iterator[Outcome]:
        """Yield one outcome for each assignment, as they arrive. After None, the next assignment waits for an outcome."""
        self._look_for_lost()
        source, exhausted = iter(assignments), False
        pending: set[Future[Outcome]] = set()
        while True:
            while not exhausted:
                assignment = next(source, _END)
                if assignment is _END:
                    exhausted = True
                elif assignment is None:
                    break
                else:
                    assert isinstance(assignment, Assignment)
                    message = self._outgoing.take(wire.stream_assignment(replace(assignment, recipe=None)))
                    pending.add(self._pool.submit(self._carry, assignment, message))
            if not pending:
                gc.collect()  # the engine keeps messages in reference cycles, which are collected too rarely for their size
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()

    def _look_for_lost(self) -> None:
        """Take back lost sites that answer again. Raises StartAgain if that needs another job."""
        lost = [site for site in self._sites.values() if site.dead_since is not None]
        answers = {site.name: self._pool.submit(self._ping, site) for site in lost}
        for site in lost:
            if answers[site.name].result():
                self._mark(site, dead=False)
                if not site.counted:
                    raise StartAgain(f"{site.name} is there now")
        dead = {site.name: site.dead_since for site in self._sites.values() if site.dead_since is not None}
        if dead and self._leave(dead):
            raise StartAgain("a site is back that this job does not reach")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _carry(self, assignment: Assignment, message: Message) -> Outcome:
        """Send one assignment to its site and return its outcome; a site's failure is a value."""
        try:
            return self._carried(assignment, message)
        finally:
            message.close()

    def _carried(self, assignment: Assignment, message: Message) -> Outcome:
        site = self._sites[assignment.client]
        site.sent_most = max(site.sent_most, len(message))
        limit = SPARE_BYTES + 4 * site.sent_most
        try:
            if site.dead_since is not None:
                raise GaveUp("absent", f"{site.name} was lost and is not back yet")
            reply = self._worked(site, message, limit)
            outcome = wire.decode_outcome(reply, limit)
            if (outcome.client, outcome.round) != (assignment.client, assignment.round):
                raise GaveUp("bad_message", f"{site.name} answered for another client or round")
            if not isinstance(outcome, Failure) and not _numbers(outcome.metrics):
                raise GaveUp("bad_message", f"{site.name} sent metrics that are not finite numbers")
        except wire.WireError as error:
            return Failure(assignment.client, assignment.round, "bad_message", str(error))
        except GaveUp as error:
            self._mark(site, dead=error.reason in LOST)
            return Failure(assignment.client, assignment.round, error.reason, error.detail)
        self._mark(site, dead=False)
        cost = replace(outcome.cost, upload_bytes=len(reply), download_bytes=len(message))
        return replace(outcome, cost=cost)

    def _worked(self, site: Site, message: Message, limit: int) -> Bytes:
        if not site.prepared:
            self._prepare(site)
        try:
            return self._exchange.done(site.name, "work", message, limit)
        except Unprepared:
            self._prepare(site)
            raise GaveUp("lost", f"{site.name} was started again and knows nothing of the rounds before") from None

    def _mark(self, site: Site, *, dead: bool) -> None:
        if dead == (site.dead_since is not None):
            return
        log.warning(f"{site.name} is {'lost: it gets work again in the next round' if dead else 'back'}")
        site.dead_since = time.time() if dead else None


class StartAgain(RunFailed):
    """Not a failure: the engine's job must start again, and the run resumes from its checkpoint."""


_END: Any = object()


def _numbers(metrics: Mapping[str, Any]) -> bool:
    return all(
        isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < float("inf") for v in metrics.values()
    )
