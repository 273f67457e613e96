"""What the round loop needs of a runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from fedloom.messages.types import Assignment, Outcome


class Runtime(Protocol):
    """Where clients run. A class whose clients may be several processes (runtime.ranks) says `takes_ranks = True`."""

    @property
    def clients(self) -> tuple[str, ...]:
        """All clients, in a fixed order."""
        ...

    @property
    def pooled_tests(self) -> bool:
        """Whether a client can be measured on all clients' test data together, which no site has of another."""
        ...

    @property
    def virtual(self) -> bool:
        """Whether time is made up: work is done as soon as it is sent, and a clock says when its outcome would arrive."""
        ...

    def run(self, assignments: Iterable[Assignment | None]) -> Iterator[Outcome]:
        """Carry the assignments to their clients; yield one outcome for each, as it arrives.

        `assignments` is pulled only while the caller waits for an outcome. None in it means that there is nothing more
        to send before the next outcome was handed over: the runtime waits for one, and pulls again afterwards; with
        nothing under way it ends. An assignment's tensors are the server's own, which the next round changes, so it is
        encoded when it is pulled. Another `run` (an evaluation) may come and go while this one is not waited for.
        """
        ...

    def close(self) -> None:
        """Let go of clients and memory."""
        ...


#: Told how far a round or an evaluation has come: ("train" | "evaluate", round, clients done, clients in all).
Tick = Callable[[str, int, int, int], None]
