"""A site's end of the exchange: it receives work in pieces, gives it to its trainer, and sends the outcome in pieces.

The agent runs in the engine's process and has no model and no data. A trainer in a child process does one piece of work
after another (runtimes/ranks/worker.py). A trainer that dies or is late is started again and gets the recipe again.
The trainer checks what leaves against the site's policy, and the agent writes it into the audit log. This file does not
know the engine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedloom.runtimes import versions
from fedloom.runtimes.ranks.worker import Stopped, Worker, WorkerLate, WorkerLost
from fedloom.runtimes.sites.link import PIECE, Answer, Bytes
from fedloom.runtimes.sites.policy import Audit, Policy, Refused

log = logging.getLogger(__name__)

#: The number of pieces of work that are kept after they end, so that an answer can be repeated.
REMEMBERED = 8


#: Seconds that a trainer has to load model and data.
PREPARE = 3600.0


State = Literal["arriving", "queued", "working", "done", "failed"]


@dataclass
class Work:
    """One piece of work on its way through the site."""

    kind: str
    size: int
    deadline: float | None
    data: Bytes = field(default=b"", init=False)
    received: int = field(default=0, init=False)
    state: State = field(default="arriving", init=False)
    result: Bytes = field(default=b"", init=False)
    reason: str = field(default="", init=False)
    detail: str = field(default="", init=False)
    stopped: bool = field(default=False, init=False)
    began: float = field(default=0.0, init=False)
    changed: threading.Event = field(default_factory=threading.Event, init=False)

    def take(self, offset: int, data: Bytes) -> None:
        """Store the bytes from `offset` on. A piece that is the whole message is kept without a copy."""
        if len(data) == self.size:
            self.data = data
            return
        if not self.data:
            self.data = bytearray(self.size)
        memoryview(self.data)[offset : offset + len(data)] = data


class Agent:
    """Answers the server's requests.

    Args:
        start: starts a trainer for a resolved recipe, with as many processes as the recipe says.
        policy, audit: the site's.
    """

    def __init__(
        self,
        start: Callable[[Mapping[str, Any]], Worker],
        policy: Policy,
        audit: Audit,
    ) -> None:
        self._start = start
        self._policy = policy
        self._audit = audit
        self._works: OrderedDict[str, Work] = OrderedDict()
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._worker: Worker | None = None
        self._orders: bytes | None = None
        self._refusal = ""
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="trainer", daemon=True)
        self._thread.start()

    def answer(self, header: Mapping[str, Any], data: Bytes) -> Answer:
        """Answer one request. Each answer is a line in the audit log."""
        verb = header.get("verb")
        verbs = {"hello": self._hello, "put": self._put, "wait": self._wait, "fetch": self._fetch, "drop": self._drop}
        answer = verbs[verb](header, data) if verb in verbs else Answer({"state": "unknown"})
        text = json.dumps(answer.header, sort_keys=True).encode()
        self._audit.left(f"answer to {verb if verb in verbs else 'an unknown question'}", text, answer.data)
        return answer

    def close(self) -> None:
        with self._ready:
            self._closed = True
            for work in self._works.values():
                work.stopped = True
            self._ready.notify_all()
        self._thread.join(timeout=10)

    # ------------------------------------------------------------------ questions

    def _hello(self, header: Mapping[str, Any], data: Bytes) -> Answer:
        theirs = header.get("versions")
        differs = versions.mismatch(versions.own(), theirs if isinstance(theirs, dict) else {})
        refusal = f"the server's versions do not fit: {differs}" if differs else ""
        if refusal and refusal != self._refusal:
            log.warning(refusal)
        self._refusal = refusal
        return Answer({"state": "here", "versions": versions.own()})

    def _put(self, header: Mapping[str, Any], data: Bytes) -> Answer:
        name, kind, deadline = str(header.get("work")), header.get("kind"), header.get("deadline")
        offset, size = _whole(header.get("offset")), _whole(header.get("size"))
        if kind not in {"prepare", "work"} or not 0 <= offset <= size or len(data) != min(PIECE, size - offset):
            return _refused("bad_message", "a piece of work cannot be read")
        if size > self._policy.max_message_bytes:
            return _refused("too_large", f"{size} bytes where at most {self._policy.max_message_bytes} are taken")
        if self._refusal:
            return _refused("version", self._refusal)
        with self._ready:
            if kind == "work" and self._orders is None:
                return Answer({"state": "unprepared"})
            if name not in self._works:
                if offset:
                    return Answer({"state": "unknown"})
                self._works[name] = Work(kind, size, deadline if isinstance(deadline, int | float) else None)
                self._forget()
            work = self._works[name]
            if work.state == "arriving" and work.size == size and not work.stopped:
                work.take(offset, data)
                work.received = max(work.received, offset + len(data))
                if work.received == size:
                    work.state = "queued"
                    self._ready.notify_all()
        return Answer({"state": "taken"})

    def _wait(self, header: Mapping[str, Any], data: Bytes) -> Answer:
        work, seconds = self._works.get(str(header.get("work"))), header.get("seconds")
        if work is None:
            return Answer({"state": "unknown"})
        work.changed.wait(min(60.0, float(seconds)) if isinstance(seconds, int | float) else 0.0)
        if work.state == "done":
            return Answer({"state": "done", "size": len(work.result)}, _piece(work, 0, header))
        if work.state == "failed":
            return _refused(work.reason, work.detail)
        return Answer({"state": work.state})

    def _fetch(self, header: Mapping[str, Any], data: Bytes) -> Answer:
        work = self._works.get(str(header.get("work")))
        offset = _whole(header.get("offset"))
        if work is None or work.state != "done" or offset < 0:
            return Answer({"state": "unknown"})
        return Answer({"state": "piece"}, _piece(work, offset, header))

    def _drop(self, header: Mapping[str, Any], data: Bytes) -> Answer:
        with self._lock:
            work = self._works.get(str(header.get("work")))
            if work is not None:
                work.stopped = True
                work.result = b""
                if work.state in {"arriving", "queued"}:
                    work.data = b""
        return Answer({"state": "dropped"})

    def _forget(self) -> None:
        """Delete the oldest work that is not in progress."""
        *before, _ = self._works
        idle = [n for n in before if self._works[n].state in {"done", "failed", "arriving"} or self._works[n].stopped]
        for name in idle[: max(0, len(self._works) - REMEMBERED)]:
            del self._works[name]

    # ------------------------------------------------------------------ work

    def _serve(self) -> None:
        """Do one piece of work after another, in its own thread."""
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._closed or self._next() is not None)
                work = self._next()
                if self._closed or work is None:
                    break
                work.state, work.began = "working", time.monotonic()
            try:
                result = self._done(work)
                work.result = b"" if work.stopped else result
                work.state = "done"
            except TROUBLE as error:
                self._fail(work, *_trouble(error))
            work.data = b""
            work.changed.set()
            self._revive()
        if self._worker is not None:
            self._worker.close()

    def _next(self) -> Work | None:
        return next((w for w in self._works.values() if w.state == "queued"), None)

    def _fail(self, work: Work, reason: str, detail: str) -> None:
        """Mark the work as failed. `detail` comes from here, or from the trainer, which checked it against the policy."""
        work.reason, work.detail = reason, detail
        work.state = "failed"
        log.warning(f"{work.kind} failed ({reason}): {detail}")

    def _revive(self) -> None:
        """Start a trainer if the last one died, so that it is ready for the next piece of work."""
        if self._worker is not None and not self._worker.alive and not self._closed:
            with contextlib.suppress(*TROUBLE):  # the next piece of work tries again, and reports the error
                self._prepared()

    def _done(self, work: Work) -> Bytes:
        if work.stopped:
            raise Stopped
        if work.kind == "prepare":
            orders = bytes(work.data)
            self._check(orders)
            self._orders = orders
            if self._worker is not None:
                self._worker.close()
                self._worker = None
            return self._prepared()
        if self._worker is None or not self._worker.alive:
            self._worker = None
            self._prepared()
            raise WorkerLost("it had ended before this round, and was started again")
        return self._ask("work", work.data, work.deadline, lambda: work.stopped or self._closed)

    def _check(self, orders: bytes) -> None:
        try:
            self._policy.check(json.loads(orders)["recipe"])
        except Refused:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Refused("the recipe that came cannot be read") from None

    def _prepared(self) -> Bytes:
        """Start a trainer and give it the recipe; return its counts of the site's data."""
        assert self._orders is not None
        self._worker = self._start(json.loads(self._orders)["recipe"])
        return self._ask("prepare", self._orders, PREPARE, lambda: self._closed)

    def _ask(
        self,
        kind: str,
        data: Bytes,
        deadline: float | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Bytes:
        assert self._worker is not None
        header, body = self._worker.ask({"kind": kind}, data, deadline, stopped)
        if header.get("state") == "refused":
            raise Refused(str(header.get("detail")))
        if header.get("state") != "done":
            raise _Erred(str(header.get("reason")), str(header.get("detail")))
        return body


class _Erred(Exception):
    """The trainer reported that its work failed."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


#: The errors of a trainer and its work. OSError: the disk is full, or a process cannot be started.
TROUBLE = (Refused, WorkerLost, WorkerLate, Stopped, _Erred, OSError)


def _trouble(error: Exception) -> tuple[str, str]:
    """Return a code and a sentence for an error. Neither contains words from the site's data."""
    match error:
        case Refused():
            return "refused", str(error)
        case _Erred():
            return error.reason, error.detail
        case WorkerLate():
            return "late", "not done within the deadline"
        case Stopped():
            return "late", "cancelled by the server"
        case OSError():
            return "crashed", f"the trainer could not be started ({os.strerror(error.errno or 0)})"
    return "crashed", str(error)


def _piece(work: Work, offset: int, header: Mapping[str, Any]) -> Bytes:
    """Return a view of the result: the requested bytes, at most `PIECE`."""
    length = min(max(0, _whole(header.get("length"))), PIECE)
    return memoryview(work.result)[offset : offset + length]


def _whole(value: object) -> int:
    """Return a count as it was sent, or -1, which no check accepts, for any other value."""
    return value if isinstance(value, int) and value >= 0 else -1


def _refused(reason: str, detail: str) -> Answer:
    return Answer({"state": "refused", "reason": reason, "detail": detail})
