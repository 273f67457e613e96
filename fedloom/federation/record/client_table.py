"""What each client measured, where clients are too many for one line of the event log: a file, and a few numbers in it.

Up to `MANY` clients an evaluation's event names each. With more it says how they are spread, and the numbers of each client
go into `evaluations/round-0003.csv`, which any spreadsheet opens. This file does not know who measured or why.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.common.files import write_bytes

#: Clients that an event or a summary names one by one.
MANY = 200


COLUMNS = ("loss", "tokens", "score", "questions")


#: What a spread says, by the share of clients that lie below.
EDGES = {"lowest": 0.0, "lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75, "highest": 1.0}


Clients = Mapping[str, Mapping[str, Any]]


class ClientTable:
    """What each client measured in the evaluations of one run. Tables of many clients lie under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.csv"

    def told(self, round: int, clients: Clients) -> dict[str, Any]:
        """What the event says of single clients. Where they are many, their table is on disk when this returns."""
        if len(clients) <= MANY:
            return {"clients": dict(clients), "spread": None}
        text = io.StringIO(newline="")
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["client", *COLUMNS])
        for client, values in clients.items():
            rows.writerow([client, *("" if values[c] is None else repr(values[c]) for c in COLUMNS)])
        write_bytes(self.path(round), text.getvalue().encode())
        return {"clients": {}, "spread": spread(clients)}

    def clients(self, round: int, result: Mapping[str, Any]) -> Clients:
        """Client → what it measured, of an evaluation as `told` left it."""
        if result["spread"] is None:
            found: Clients = result["clients"]
            return found
        with self.path(round).open(encoding="utf-8", newline="") as file:
            return {row["client"]: {c: _number(row[c], c) for c in COLUMNS} for row in csv.DictReader(file)}


def spread(clients: Clients) -> dict[str, Any]:
    """How many clients, and for loss and score the values that these shares of them lie below; null where none has one."""
    made: dict[str, Any] = {"clients": len(clients)}
    for key in ("loss", "score"):
        values = sorted(v[key] for v in clients.values() if v[key] is not None)
        made[key] = {name: quantile(values, share) for name, share in EDGES.items()} if values else None
    return made


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value at `share` of sorted values, interpolated."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _number(text: str, column: str) -> float | int | None:
    if not text:
        return None
    return int(text) if column in {"tokens", "questions"} else float(text)
