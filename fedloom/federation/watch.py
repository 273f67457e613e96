"""Who is told what while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Told how far a round or an evaluation has come: ("train" | "evaluate", round, clients done, clients in all).
Tick = Callable[[str, int, int, int], None]


@dataclass
class Watch:
    """Who is told what while a run goes on; the CLI draws its progress from it."""

    say: Callable[[str], None] = lambda text: None
    event: Callable[[dict[str, Any]], None] | None = None
    tick: Tick = lambda what, round, done, total: None
