"""Run functions alternately: each in its own thread, and never two at the same time.

A function runs only while `go_on` waits for it. It returns control by calling `pause`, at any call depth. So ordinary
code can stop in the middle, for work that is done for several functions at once. It needs no locks, because it runs alone
between two pauses. This file does not know what the functions do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """Raised by `pause` when another function has failed: this one must end."""


class Runner(Generic[T]):
    """One function in its own thread.

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
        """Run the function to its next pause or its end. Raises its exception."""
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Wait for the next `go_on`. Only the function itself calls this."""
        self._back.release()
        self._turn.acquire()
        if self._stopped:
            raise Stopped

    @property
    def result(self) -> T:
        """The function's return value, after its end."""
        return self._result[0]

    def stop(self) -> None:
        """End the function at its current pause, and wait until it has ended."""
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
        except BaseException as error:  # `go_on` raises it again
            self._error = error
        self.done = True
        self._back.release()


def stop_all(runners: Sequence[Runner[T]]) -> None:
    """End all functions that have not ended."""
    for runner in runners:
        runner.stop()
