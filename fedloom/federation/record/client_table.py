"""What each client measured, where clients are too many for one line of the event log: a file, and a few numbers in it.

Up to `MANY` clients an evaluation's event names each. With more it says how they are spread, and the numbers of each client
go into `evaluations/round-0003.csv`, which any spreadsheet opens. This file does not know who measured or why.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from fedloom.common.files import write_bytes
from fedloom.evaluation.means import Means

#: Clients that an event or a summary names one by one.
MANY = 200


COLUMNS = ("loss", "tokens", "score", "questions")


#: What a spread says, by the share of clients that lie below.
EDGES = {"lowest": 0.0, "lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75, "highest": 1.0}


Clients = Mapping[str, Means]


class Quantiles(TypedDict):
    """The values that the shares of clients in `EDGES` are below."""

    lowest: float
    lower_quartile: float
    median: float
    upper_quartile: float
    highest: float


class Spread(TypedDict):
    """How many clients, and how their values are spread; None where no client has one."""

    clients: int
    loss: Quantiles | None
    score: Quantiles | None


class Told(TypedDict):
    """The part of an evaluation's event that is about single clients: each by name, or how they are spread."""

    clients: Clients
    spread: Spread | None


class ClientTable:
    """What each client measured in the evaluations of one run. Tables of many clients lie under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.csv"

    def told(self, round: int, clients: Clients) -> Told:
        """What the event says of single clients. Where they are many, their table is on disk when this returns."""
        if len(clients) <= MANY:
            return {"clients": dict(clients), "spread": None}
        text = io.StringIO(newline="")
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["client", *COLUMNS])
        for client, own in clients.items():
            values = (own["loss"], own["tokens"], own["score"], own["questions"])
            rows.writerow([client, *("" if value is None else repr(value) for value in values)])
        write_bytes(self.path(round), text.getvalue().encode())
        return {"clients": {}, "spread": spread(clients)}

    def clients(self, round: int, evaluation: Mapping[str, Any]) -> Clients:
        """Client → what it measured, of an evaluation as JSON that has what `told` returned."""
        if evaluation["spread"] is None:
            named: Clients = evaluation["clients"]
            return named
        with self.path(round).open(encoding="utf-8", newline="") as file:
            return {row["client"]: _means(row) for row in csv.DictReader(file)}


def spread(clients: Clients) -> Spread:
    """How many clients there are, and the quantiles of their losses and scores."""
    every = clients.values()
    return {
        "clients": len(clients),
        "loss": _quantiles(own["loss"] for own in every),
        "score": _quantiles(own["score"] for own in every),
    }


def _quantiles(values: Iterable[float | None]) -> Quantiles | None:
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    lowest, lower, median, upper, highest = (quantile(ordered, share) for share in EDGES.values())
    return {"lowest": lowest, "lower_quartile": lower, "median": median, "upper_quartile": upper, "highest": highest}


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value at `share` of sorted values, interpolated."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _means(row: Mapping[str, str]) -> Means:
    loss, score = row["loss"], row["score"]
    return {
        "loss": float(loss) if loss else None,
        "tokens": int(row["tokens"]),
        "score": float(score) if score else None,
        "questions": int(row["questions"]),
    }
