"""How far a run has come, as its checkpoints have it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedloom.messages.types import Cost


@dataclass
class Progress:
    """The coordinator's own notes, part of every checkpoint.

    Attributes:
        finished: rounds finished.
        cost: of all messages and work, evaluation included.
        evaluation_cost: the part of it that evaluation took.
        evaluations: rounds finished → what was measured then.
        failures, skipped_steps: counted over the run.
        stopped: the round, the hook and the sentence of a run that a hook ended before its last round.
        earlier: (wall, CPU) seconds of the sessions before this one.
    """

    finished: int = 0
    cost: Cost = Cost()
    evaluation_cost: Cost = Cost()
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: int = 0
    skipped_steps: int = 0
    stopped: dict[str, Any] | None = None
    earlier: tuple[float, float] = (0.0, 0.0)
    _started: tuple[float, float] = field(default_factory=lambda: (time.perf_counter(), time.process_time()))

    def elapsed(self) -> tuple[float, float]:
        """(wall, CPU) seconds of the run so far, all sessions that left a checkpoint together."""
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        return self.earlier[0] + wall, self.earlier[1] + cpu

    def notes(self) -> dict[str, Any]:
        return {
            "cost": asdict(self.cost),
            "evaluation_cost": asdict(self.evaluation_cost),
            "evaluations": {str(k): v for k, v in self.evaluations.items()},
            "failures": self.failures,
            "skipped_steps": self.skipped_steps,
            "stopped": self.stopped,
            "elapsed": list(self.elapsed()),
        }

    @classmethod
    def from_notes(cls, finished: int, notes: Mapping[str, Any]) -> Progress:
        return cls(
            finished,
            Cost(**notes["cost"]),
            Cost(**notes["evaluation_cost"]),
            {int(k): v for k, v in notes["evaluations"].items()},
            notes["failures"],
            notes["skipped_steps"],
            notes["stopped"],
            (notes["elapsed"][0], notes["elapsed"][1]),
        )
