"""Train a simulator's clients in a trainer of several ranks. `Ranked` replaces `Client` in the simulator.

The trainer (main.py) starts with the first piece of work, and again after it died. It loads the data and its own base,
so this process keeps only the server's. If a rank was killed, or ran out of memory, that client failed. An error in the
trainer's own code is raised here. This file does not know what a client does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fedloom.common.errors import UserError
from fedloom.messages import wire
from fedloom.messages.types import Assignment, Failure, Outcome
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.ranks.worker import Worker, WorkerLost

#: The largest message in bytes: on one machine, only memory limits it.
LIMIT = 1 << 40


#: Lines of the trainer's log that an error shows.
LAST_LINES = 40


class RankFailed(RuntimeError):
    """A trainer ended with an error in its own code; the message has the end of its log."""


class Ranked:
    """Does each piece of work in a trainer of `recipe.runtime.ranks` processes.

    Args:
        recipe: resolved.
        folder: the run's folder; the trainer's output goes to `ranks.log` in it.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe = recipe
        self._folder = folder
        self._log = folder / "ranks.log"
        self._worker: Worker | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        return self._worker.pids if self._worker else ()

    def handle(self, assignment: Assignment) -> Outcome:
        """Return the outcome from the trainer's first rank. Raises RankFailed for a programming error in the trainer."""
        try:
            if self._worker is None or not self._worker.alive:
                self.close()
                self._start()
            assert self._worker is not None
            _, body = self._worker.ask({"kind": "work"}, wire.encode_assignment(assignment))
        except WorkerLost as lost:
            if lost.error:
                raise RankFailed(f"{lost}:\n{self._last_lines()}") from None
            return Failure(assignment.client, assignment.round, "crashed", str(lost))
        return wire.decode_outcome(body)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _start(self) -> None:
        self._worker = self._started()
        orders: dict[str, Any] = {"recipe": self._recipe.resolved(), "folder": str(self._folder.resolve())}
        header, _ = self._worker.ask({"kind": "prepare"}, json.dumps(orders).encode())
        if header["state"] != "done":
            self.close()
            raise UserError(str(header["detail"]))

    def _started(self) -> Worker:
        return Worker(
            [sys.executable, "-m", "fedloom.runtimes.ranks.main"], self._log, LIMIT, self._recipe.runtime.ranks
        )

    def _last_lines(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
