"""Send one piece of work to a site and get its result, by short requests of which none waits for the whole work.

    put     send the work, in bounded pieces; the site answers once it has the piece
    wait    is it done? The site waits some seconds before it answers; the answer has the result's first piece
    fetch   get the result's other pieces
    drop    let the site forget the work, or stop it; after a result nothing waits for this answer

Each request can be repeated: a site that already has it gives the same answer. This file does not know what the bytes
mean, nor how a site that fails is treated.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.runtimes.sites.link import CODE, PIECE, Answer, Bytes, Link
from fedloom.runtimes.sites.outbox import Message


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds.

    Attributes:
        answer: for the answer to one request, plus the time that the site itself waits.
        silence: until a site that does not answer counts as lost.
        poll: how long the site may wait before it answers `wait`.
        start: for a site's process to start.
        prepare: for a site to load model and data, and for work to wait there behind other work.
        deadline: for one piece of work (federation.round_deadline); None waits as long as the site answers.
    """

    answer: float = 20.0
    silence: float = 30.0
    poll: float = 5.0
    start: float = 90.0
    prepare: float = 3600.0
    deadline: float | None = None


class GaveUp(Exception):
    """A site did not do its work; `reason` is a short code, `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Unprepared(Exception):
    """The site accepts no work: its process has not received a recipe yet."""


class Exchange:
    """Sends requests to any number of sites at once.

    Args:
        link: the engine.
        later: runs a call whose result is not needed.
    """

    def __init__(self, link: Link, patience: Patience, later: Callable[[Callable[[], object]], object]) -> None:
        self._link = link
        self._patience = patience
        self._later = later
        self._session = f"{time.time_ns():x}"
        self._numbers = itertools.count()  # one step of it is atomic

    def done(self, site: str, kind: str, data: Message, limit: int) -> Bytes:
        """Send `data`, wait for the work, and fetch the result: at most `limit` bytes.

        Raises:
            GaveUp: the site did not do the work.
            Unprepared: the site needs the recipe first.
        """
        work = f"{self._session}-{next(self._numbers)}"
        deadline = self._patience.deadline if kind == "work" else self._patience.prepare
        for offset in range(0, max(1, len(data)), PIECE):
            header = {
                "verb": "put",
                "work": work,
                "kind": kind,
                "offset": offset,
                "size": len(data),
                "deadline": deadline,
            }
            answer = self._asked(site, header, data.piece(offset))
            if kind == "work" and answer.header.get("state") == "unprepared":
                raise Unprepared
            _expect(site, answer, "taken")
        data.close()  # the work may take hours
        size, first = self._awaited(site, work, deadline, min(PIECE, limit))
        if size > limit:
            self._drop(site, work)
            raise GaveUp("too_large", f"{site} announced {size} bytes where at most {limit} are taken")
        result = self._fetched(site, work, size, first)
        self._later(lambda: self._drop(site, work))
        return result

    def _fetched(self, site: str, work: str, size: int, first: Bytes) -> Bytes:
        """Fetch the rest of the result after its `first` bytes; return the whole result."""
        if len(first) == size:
            return first
        result = bytearray(first)
        while len(result) < size:
            answer = self._asked(site, {"verb": "fetch", "work": work, "offset": len(result), "length": PIECE})
            _expect(site, answer, "piece")
            if not 0 < len(answer.data) <= min(PIECE, size - len(result)):
                raise _other_size(site)
            result += answer.data
        return result

    def _drop(self, site: str, work: str) -> None:
        self._link.ask(site, {"verb": "drop", "work": work}, b"", self._patience.answer)

    def _awaited(self, site: str, work: str, deadline: float | None, length: int) -> tuple[int, Bytes]:
        """Wait until the work is done; return the size of its result, and the first bytes, at most `length`."""
        since = time.monotonic()
        begin_by = since + self._patience.prepare
        while True:
            patience = self._patience.poll
            if deadline is not None:
                patience = min(patience, max(0.0, since + deadline - time.monotonic()))
            header = {"verb": "wait", "work": work, "seconds": patience, "length": length}
            until = None if deadline is None else since + deadline + 1.0
            answer = self._asked(site, header, waits=patience, until=until)
            state, size = answer.header.get("state"), answer.header.get("size")
            if state == "done" and isinstance(size, int) and size >= 0:
                if len(answer.data) > min(length, size):
                    raise _other_size(site)
                return size, answer.data
            if state == "queued" and time.monotonic() < begin_by:  # its time begins when the trainer is free
                since = time.monotonic()
            elif state == "queued":
                self._drop(site, work)
                raise GaveUp("late", f"{site} has been busy with other work for {self._patience.prepare:g} seconds")
            elif state == "working" and deadline is not None and time.monotonic() >= since + deadline:
                self._drop(site, work)
                raise GaveUp("late", f"{site} was not done within its {deadline:g} seconds")
            elif state == "unknown":
                raise GaveUp("lost", f"{site} was started again in the middle of its work")
            elif state not in {"working", "queued"}:
                raise _told(site, answer)

    def _asked(
        self, site: str, header: Mapping[str, Any], data: bytes = b"", waits: float = 0.0, until: float | None = None
    ) -> Answer:
        """Send a request until an answer comes. Raises GaveUp after too much silence or after the deadline."""
        silent = time.monotonic() + self._patience.silence + waits
        while True:
            patience = self._patience.answer + waits
            if until is not None:
                patience = min(patience, max(0.1, until - time.monotonic()))
            answer = self._link.ask(site, header, data, patience)
            if answer is not None:
                return answer
            if until is not None and time.monotonic() >= until:
                raise GaveUp("late", f"{site} gives no answer and the deadline is over")
            if time.monotonic() >= silent:
                raise GaveUp("lost", f"{site} gives no answer")
            time.sleep(0.2)


def _expect(site: str, answer: Answer, state: str) -> None:
    if answer.header.get("state") != state:
        raise _told(site, answer)


def _other_size(site: str) -> GaveUp:
    return GaveUp("bad_message", f"{site} sent a piece of another size than was asked for")


def _told(site: str, answer: Answer) -> GaveUp:
    """Turn a site's report of failed work into an exception. Code and sentence are bounded."""
    reason, detail = answer.header.get("reason"), answer.header.get("detail")
    if not isinstance(reason, str) or not CODE.fullmatch(reason) or not isinstance(detail, str):
        return GaveUp("bad_message", f"{site} gave an answer that cannot be read")
    return GaveUp(reason, f"{site}: {detail[:500]}")
