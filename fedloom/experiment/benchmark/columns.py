"""The columns of a benchmark's tables: how each number of a finished run is read, written and compared.

`MEASURED` has the evaluation results. They follow from the recipe alone, so a benchmark that was killed and resumed
gives the same ones. `TRAFFIC` is repeatable except for a few bytes. `SPENT` depends on this machine.
This file does not know which runs are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.federation.record.client_table import ClientTable
from fedloom.federation.record.events import read_events
from fedloom.federation.record.run_folder import RunFolder
from fedloom.reporting.summary_types import read_summary

#: summary.json, with `messages` and `own` added (`measured`).
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One number of a run.

    Attributes:
        key: the column's name in the CSV; a second column `KEY_std` has the standard deviation over seeds.
        title: the column's heading on pages and terminals.
        read: returns the number, None where the run has none.
        text: formats the number for people.
        better: "less" or "more", whichever is better; "" for neither.
    """

    key: str
    title: str
    read: Callable[[Numbers], float | None]
    text: Callable[[float], str]
    better: str = ""


def measured(folder: Path) -> Numbers | None:
    """Read the numbers of the run in `folder`; None where it is not finished.

    `messages` has the mean bytes of a client's update and of its assignment. The first messages to a client also have
    the recipe and what is broadcast once, so they count only where there are no others. `own` has every client's loss
    and score on its own test data; summary.json lists those one by one only for a few clients.
    """
    summary = read_summary(RunFolder(folder))
    if summary is None:
        return None
    events = read_events(folder / "events.jsonl") if (folder / "events.jsonl").is_file() else []
    return {**summary, "messages": _messages(events), "own": _own(events, ClientTable(folder / "evaluations"))}


def _messages(events: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    updates = [e for e in events if e["event"] == "client_update"]
    later = [e for e in updates if not e.get("broadcast_bytes")] or updates
    return {
        way: statistics.fmean(e[f"{way}_bytes"] for e in later) if later else None for way in ("upload", "download")
    }


def _own(events: Sequence[Mapping[str, Any]], tables: ClientTable) -> dict[str, list[float]]:
    last = next((e for e in reversed(events) if e["event"] == "evaluation"), None)
    clients = tables.clients(last["round"], last).values() if last else ()
    return {
        "loss": [own["loss"] for own in clients if own["loss"] is not None],
        "score": [own["score"] for own in clients if own["score"] is not None],
    }


def at(*keys: str) -> Callable[[Numbers], float | None]:
    """Return a reader of the number under nested `keys`; it gives None where a key is missing or null."""

    def read(numbers: Numbers) -> float | None:
        found: Any = numbers
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return None if found is None else float(found)

    return read


def _mean_own(numbers: Numbers) -> float | None:
    """The mean over clients of the loss on their own test data."""
    losses = numbers["own"]["loss"]
    return statistics.fmean(losses) if losses else None


def _spread(what: str) -> Callable[[Numbers], float | None]:
    """Return a reader of the standard deviation over clients; it gives None for fewer than two."""

    def read(numbers: Numbers) -> float | None:
        values = numbers["own"][what]
        return statistics.pstdev(values) if len(values) > 1 else None

    return read


def _uploaded(numbers: Numbers) -> float | None:
    """Bytes that clients sent in training, without evaluation."""
    cost = numbers["cost"]
    return float(cost["upload_bytes"] - cost["evaluation_upload_bytes"])


def _downloaded(numbers: Numbers) -> float | None:
    """Bytes sent to clients in training, without evaluation and without first messages, which have their own column."""
    cost = numbers["cost"]
    training = cost["download_bytes"] - cost["evaluation_download_bytes"]
    return float(training - cost.get("broadcast_bytes", 0) + cost.get("evaluation_broadcast_bytes", 0))


def size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def count(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


_loss, _score = "{:.4f}".format, "{:.3f}".format


MEASURED = (
    Column("score", "score", at("score", "after"), _score, "more"),
    Column("score_worst_client", "worst client's score", at("score", "worst_client", "after"), _score, "more"),
    Column("score_spread", "score spread", _spread("score"), _score, "less"),
    Column("loss_before", "loss before", at("loss", "before"), _loss),
    Column("loss", "loss", at("loss", "after"), _loss, "less"),
    Column("loss_own", "mean own loss", _mean_own, _loss, "less"),
    Column("loss_worst_client", "worst client's loss", at("loss", "worst_client", "after"), _loss, "less"),
    Column("loss_spread", "loss spread", _spread("loss"), _loss, "less"),
    Column("emulator_before", "emulator before", at("offsite", "emulator_zero_shot", "loss"), _loss),
    Column("emulator_tuned", "emulator tuned", at("offsite", "emulator_tuned", "loss"), _loss, "less"),
    Column("full_tuned", "full model tuned", at("offsite", "full_tuned", "loss"), _loss, "less"),
    Column(
        "left_server", "left the server", at("offsite", "left_server", "share_of_parameters"), "{:.1%}".format, "less"
    ),
    Column("parameters", "parameters", at("adapter", "parameters"), count),
    Column("train_tokens", "tokens", at("cost", "train_tokens"), count),
    Column("train_flops", "FLOPs", at("cost", "train_flops"), count, "less"),
    Column("failures", "failures", at("failures"), "{:.0f}".format),
)


#: A message says how long its work took, so its length differs by a few bytes from run to run.
TRAFFIC = (
    Column("message_up_bytes", "a message up", at("messages", "upload"), size, "less"),
    Column("message_down_bytes", "a message down", at("messages", "download"), size, "less"),
    Column("upload_bytes", "up", _uploaded, size, "less"),
    Column("download_bytes", "down", _downloaded, size, "less"),
    Column("broadcast_bytes", "first messages", at("cost", "broadcast_bytes"), size, "less"),
)


SPENT = (
    Column("cpu_seconds", "CPU time", at("cost", "cpu_seconds"), "{:.0f} s".format),
    Column("gpu_seconds", "GPU time", lambda numbers: at("cost", "gpu_seconds")(numbers) or None, "{:.0f} s".format),
    Column("wall_seconds", "time", at("cost", "wall_seconds"), "{:.0f} s".format),
    Column("peak_memory_bytes", "memory", at("cost", "peak_memory_bytes"), size),
)


COLUMNS = (*MEASURED, *TRAFFIC, *SPENT)


#: Key → column.
NAMED = {column.key: column for column in COLUMNS}
