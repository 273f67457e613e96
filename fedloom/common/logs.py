"""What fedloom logs while it works, and who hears it.

Every module logs its sentences with Python's `logging`, to a logger of its own below "fedloom": progress as INFO, what a
user should know as WARNING. The package adds no handler that shows anything, so nobody hears them unless they ask. Users
configure `logging` as for any library. The terminal, a run's `Watch` and a process with a log file use this module:

    with heard_by(print):     →  the messages of this thread, in this block
    print_sentences()         →  all messages of this process, as long as it lives
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Say = Callable[[str], None]

ROOT = logging.getLogger("fedloom")

#: Functions that get this thread's messages. Another thread, with another run, has its own.
_HEARERS: ContextVar[tuple[Say, ...]] = ContextVar("hearers", default=())


class _ToHearers(logging.Handler):
    """The handler of the logger "fedloom" while anybody hears.

    To receive INFO, this logger needs the level INFO. Then the user's own handlers would show INFO too, even if the
    user wants
    only warnings. So this handler stops propagation and passes on what those handlers would have received without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.Lock()
        self._open = 0
        self._level, self._propagate, self._least = logging.NOTSET, True, logging.WARNING

    def createLock(self) -> None:
        """Create no lock: runs in several threads may log at the same time."""
        self.lock = None

    def open(self) -> None:
        with self._guard:
            if self._open == 0:
                self._level, self._propagate, self._least = ROOT.level, ROOT.propagate, ROOT.getEffectiveLevel()
                ROOT.addHandler(self)
                ROOT.setLevel(min(logging.INFO, self._least))
                ROOT.propagate = False
            self._open += 1

    def shut(self) -> None:
        with self._guard:
            self._open -= 1
            if self._open == 0:
                ROOT.removeHandler(self)
                ROOT.setLevel(self._level)
                ROOT.propagate = self._propagate

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.INFO:
            for say in _HEARERS.get():
                say(record.getMessage())
        if self._propagate and record.levelno >= self._least and ROOT.parent is not None and ROOT.parent.hasHandlers():
            ROOT.parent.callHandlers(record)  # without handlers it would print, as its last resort


_TO_HEARERS = _ToHearers()


@contextmanager
def heard_by(say: Say) -> Iterator[None]:
    """Call `say` with each sentence that fedloom logs in this thread, while the block lasts.

    A function that hears already is called once for each sentence. What it raises comes out of the line that logs.
    """
    hearers = _HEARERS.get()
    with _listening(hearers if say in hearers else (*hearers, say)):
        yield


@contextmanager
def reworded(change: Callable[[str], str | None]) -> Iterator[None]:
    """Give those who hear this thread `change(sentence)` while the block lasts, and nothing where that is None."""

    def passed(say: Say) -> Say:
        def told(text: str) -> None:
            changed = change(text)
            if changed is not None:
                say(changed)

        return told

    with _listening(tuple(passed(say) for say in _HEARERS.get())):
        yield


@contextmanager
def _listening(hearers: tuple[Say, ...]) -> Iterator[None]:
    token = _HEARERS.set(hearers)
    _TO_HEARERS.open()
    try:
        yield
    finally:
        _TO_HEARERS.shut()
        _HEARERS.reset(token)


def same_hearers() -> Callable[[], None]:
    """For threads that do this one's work: call what is returned in each of them first."""
    hearers = _HEARERS.get()

    def take() -> None:
        _HEARERS.set(hearers)

    return take


def print_sentences() -> None:
    """From now on, each sentence of this process is a line of its standard output, which is the log file of a trainer."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ROOT.addHandler(handler)
    ROOT.setLevel(logging.INFO)
