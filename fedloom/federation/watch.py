"""Callbacks that receive a run's log lines, events and progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from fedloom.common.logs import heard_by
from fedloom.federation.record.events import Event

#: Called with the progress of a round or an evaluation: ("train" | "evaluate", round, clients done, clients in all).
Tick = Callable[[str, int, int, int], None]


@dataclass
class Watch:
    """Receives a run's log lines, events and progress; the CLI draws its progress bar from it.

    Attributes:
        say: called with each line that fedloom logs (common/logs.py) during the run. None: only handlers of `logging`
            receive them.
        event: called with each event of events.jsonl.
        tick: called with the progress of a round or an evaluation.
    """

    say: Callable[[str], None] | None = None
    event: Callable[[Event], None] | None = None
    tick: Tick = lambda what, round, done, total: None

    def hearing(self) -> AbstractContextManager[None]:
        """In this context, `say` is called with each line that this thread logs."""
        return nullcontext() if self.say is None else heard_by(self.say)
