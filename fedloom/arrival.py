"""Updates in client order, whatever order they arrive in: what makes an aggregate the same, bit for bit, every time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fedloom.checkpoint import from_bytes, to_bytes
from fedloom.types import Failure, Outcome, Payload, Update


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
