"""Functions that take turns: each runs in a thread of its own, and never two at once.

A function goes on only while `go_on` waits for it, and hands the baton back by calling `pause` from within, however
deep. So code that was written to run straight through can stop in the middle for something that is done for several of
them together, and nothing in it needs a lock: between two pauses it is alone. This file does not know what they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """Raised out of `pause` where the others have failed: nothing is to be made of this function any more."""


class Runner(Generic[T]):
    """One function and how far it has come.

    Attributes:
        done: whether it has returned or raised.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self.done = False
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._stopped = False
        self._turn, self._back = threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let it run to its next pause or its end. Raises what it raised."""
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """From within: wait for the next `go_on`."""
        self._back.release()
        self._turn.acquire()
        if self._stopped:
            raise Stopped

    @property
    def result(self) -> T:
        """What it returned."""
        return self._result[0]

    def stop(self) -> None:
        """End it where it stands, and wait until it has."""
        if self._thread.is_alive() and not self.done:
            self._stopped = True
            self._turn.release()
        self._thread.join()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._stopped:
                self._result.append(self._function())
        except Stopped:
            pass
        except BaseException as error:  # raised again where it was waited for
            self._error = error
        self.done = True
        self._back.release()


def stop_all(runners: Sequence[Runner[T]]) -> None:
    """End those that are not at their end."""
    for runner in runners:
        runner.stop()
