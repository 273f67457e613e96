"""How the updates of a round come together: the contract of its two ways, synchronous.py and asynchronous.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedloom.common.errors import RunFailed
from fedloom.messages.types import Outcome, Update

#: Takes each outcome of a round; returns the update where it may be aggregated, None where it may not.
Accept = Callable[[Outcome], Update | None]


class UpdateSource(Protocol):
    """Where the coordinator has a round's updates from. There is one for a whole run.

    Attributes:
        now: virtual seconds since the start of the run; None where time is real.
    """

    now: float | None

    def begin(self, round: int) -> list[str]:
        """Begin a round. Returns the clients that are at work for it, in their fixed order."""
        ...

    def updates(self, accept: Accept) -> Iterator[Update]:
        """The round's updates in client order, of the outcomes that `accept` takes.

        Raises RunFailed where they are fewer than federation.min_clients.
        """
        ...

    def about(self, outcome: Update) -> dict[str, Any]:
        """What an event says of when this update came; called while `accept` has it."""
        ...

    def notes(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as JSON."""
        ...

    def files(self) -> dict[str, Path]:
        """What a checkpoint has to hold, as files."""
        ...

    def load(self, notes: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """Resume from the notes and files of a checkpoint."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


def below_quorum(round: int, usable: int, fewest: int) -> RunFailed:
    """The error of a round with fewer updates than federation.min_clients."""
    return RunFailed(
        f"round {round} got {usable} usable updates and needs {fewest} (federation.min_clients): "
        f"{round - 1} finished rounds are kept"
    )
