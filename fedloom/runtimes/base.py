"""A runtime lists clients, takes assignments and yields what comes back, in whatever order it comes.

It moves encoded messages, counts their bytes into the outcomes' cost, and turns a client that fell silent into a
`Failure`. It does not know which algorithm it carries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from fedloom.types import Assignment, Outcome


class Runtime(Protocol):
    """Where clients run."""

    @property
    def clients(self) -> tuple[str, ...]:
        """All clients, in a fixed order."""
        ...

    @property
    def pooled_tests(self) -> bool:
        """Whether a client can be measured on all clients' test data together, which no site has of another."""
        ...

    def run(self, assignments: Iterable[Assignment]) -> Iterator[Outcome]:
        """Carry the assignments to their clients; yield one outcome for each, as it arrives."""
        ...

    def close(self) -> None:
        """Let go of clients and memory."""
        ...
