"""Who is told what while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from fedloom.common.logs import heard_by
from fedloom.federation.record.events import Event

#: Told how far a round or an evaluation has come: ("train" | "evaluate", round, clients done, clients in all).
Tick = Callable[[str, int, int, int], None]


@dataclass
class Watch:
    """Who is told what while a run goes on; the CLI draws its progress from it.

    Attributes:
        say: called with each sentence that fedloom logs (common/logs.py) while the run goes on. None: those who configure
            `logging` hear them, and nobody else.
    """

    say: Callable[[str], None] | None = None
    event: Callable[[Event], None] | None = None
    tick: Tick = lambda what, round, done, total: None

    def hearing(self) -> AbstractContextManager[None]:
        """While it lasts, `say` is called with what is logged in this thread."""
        return nullcontext() if self.say is None else heard_by(self.say)
