"""Updates in client order, whatever order they arrive in: what makes an aggregate the same, bit for bit, every time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import Failure, Outcome, Payload, Update


def in_order(outcomes: Iterator[Outcome], order: Sequence[str], folder: Path) -> Iterator[Outcome]:
    """Outcomes in client order, whatever order they arrive in.

    Payloads that arrive early wait on disk under `folder`, so memory holds one update at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".early-") as scratch:
        waiting: dict[str, Outcome] = {}
        position = {client: i for i, client in enumerate(order)}
        turn = 0
        for outcome in outcomes:
            if position[outcome.client] != turn:
                if isinstance(outcome, Update):
                    (Path(scratch) / str(position[outcome.client])).write_bytes(to_bytes(outcome.payload))
                    outcome = replace(outcome, payload=Payload())
                waiting[outcome.client] = outcome
                continue
            yield outcome
            del outcome  # what was folded is let go of before the next one is decoded
            turn += 1
            while turn < len(order) and order[turn] in waiting:
                yield _fetched(waiting.pop(order[turn]), Path(scratch) / str(turn))
                turn += 1
        for client in order[turn:]:
            if client in waiting:
                yield _fetched(waiting.pop(client), Path(scratch) / str(position[client]))


def by_client(updates: Iterator[Update], order: Sequence[str], folder: Path) -> Iterator[Update]:
    """All of `updates`, then in client order, a client's older one first; until then their payloads lie under `folder`."""
    position = {client: i for i, client in enumerate(order)}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".buffer-") as scratch:
        held: list[tuple[int, int, Update]] = []
        for update in updates:
            key = (position[update.client], update.round)
            Path(scratch, "{}-{}".format(*key)).write_bytes(to_bytes(update.payload))
            held.append((*key, replace(update, payload=Payload())))
        for client, round, update in sorted(held, key=lambda item: item[:2]):
            path = Path(scratch, f"{client}-{round}")
            yield replace(update, payload=from_bytes(path.read_bytes()))
            path.unlink()


def _fetched(outcome: Outcome, path: Path) -> Outcome:
    if isinstance(outcome, Failure):
        return outcome
    payload = from_bytes(path.read_bytes())
    path.unlink()
    return replace(outcome, payload=payload)


#: Lets through the updates that may be aggregated.
Accept = Callable[[Iterator[Outcome]], Iterator[Update]]


class Gathering(Protocol):
    """One for a whole run; the coordinator does not know which.

    Attributes:
        now: virtual seconds since the start of the run; None where time is real.
    """

    now: float | None

    def begin(self, round: int) -> list[str]:
        """Begin a round. Returns the clients that are at work for it, in their fixed order."""
        ...

    def gather(self, accepted: Accept) -> Iterator[Update]:
        """The round's updates in client order, of the outcomes that `accepted` lets through."""
        ...

    def about(self, outcome: Update) -> dict[str, Any]:
        """What an event says of when this update came; asked as `accepted` sees it."""
        ...

    def notes(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as JSON."""
        ...

    def files(self) -> dict[str, Path]:
        """And as files."""
        ...

    def load(self, notes: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """Go on from a checkpoint's."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...
