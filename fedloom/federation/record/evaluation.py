"""The record of one evaluation, as events.jsonl and the checkpoints have it (docs/run-folder.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedloom.evaluation.means import Means, PreferenceMeans
from fedloom.federation.record.client_table import Clients, Spread


@dataclass(frozen=True)
class Evaluation:
    """What was measured after some rounds.

    Attributes:
        loss, score, questions: over all clients together.
        tokens: supervised tokens of all clients' own test data.
        clients: client → its own means; empty where they are many, and `spread` is there.
        seconds: wall time.
        pooled: whether `loss` and `score` are means over the clients' personal models.
        emulator: under offsite tuning, what the clients measured of their emulator.
        virtual_seconds: since the start of the run; None where time is real.
    """

    loss: float | None
    score: float | None
    questions: int
    tokens: int
    clients: Clients = field(default_factory=dict)
    spread: Spread | None = None
    seconds: float = 0.0
    pooled: bool = False
    emulator: Means | None = None
    preference: PreferenceMeans | None = None
    virtual_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields of the event `evaluation`, without its round."""
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_json`; also reads a whole event."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})
