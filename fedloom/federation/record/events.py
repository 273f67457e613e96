"""Write a run's events: events.jsonl, one JSON object for each line, and bridges to other trackers.

Every event has `event`, `time` (seconds since the epoch) and the fields named in `SCHEMA`. A line is written whole and
flushed before the next begins, so a killed run leaves at most one broken line, the last, which `read_events` drops.
This file does not know where the numbers come from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

from fedloom.common.errors import UserError, suggest

#: Event → its fields in addition to `event` and `time`. docs/run-folder.md explains each; a test checks both.
SCHEMA: dict[str, tuple[str, ...]] = {
    "run_started": ("name", "algorithm", "model", "corpus", "clients", "rounds", "parameters"),
    "run_resumed": ("round", "rounds", "note"),
    "round_started": ("round", "clients"),
    "client_update": (
        "round", "client", "examples", "tokens", "steps", "skipped_steps", "loss",
        "upload_bytes", "download_bytes", "broadcast_bytes", "seconds", "staleness", "arrived", "metrics",
    ),
    "client_failed": ("round", "client", "kind", "reason", "detail"),
    "round_finished": (
        "round", "updates", "failures", "loss", "upload_bytes", "download_bytes", "seconds", "metrics",
    ),
    "evaluation": (
        "round", "loss", "score", "questions", "tokens", "clients", "spread", "seconds",
        "virtual_seconds", "pooled", "emulator", "preference",
    ),
    "run_stopped": ("round", "hook", "reason"),
    "checkpoint": ("round", "path"),
    "run_finished": ("rounds", "adapter_sha256", "seconds"),
}  # fmt: skip


#: One line of events.jsonl: `event`, `time` and the fields that `SCHEMA` names for it, as JSON values.
Event = dict[str, Any]


class Stopped(TypedDict):
    """The fields of `run_stopped`: the last round of a run that a hook ended, the hook and its explanation."""

    round: int
    hook: str
    reason: str


class Tracker(Protocol):
    """Receives the numbers of a run as they are logged."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Events:
    """The event log of one run. Also hands numbers to trackers and each event to `listener` (the CLI's progress)."""

    def __init__(
        self,
        path: Path,
        listener: Callable[[Event], None] | None = None,
        trackers: Iterable[Tracker] = (),
    ) -> None:
        self.path = path
        self.listener = listener
        self.trackers = tuple(trackers)
        _cut_broken_tail(path)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Raises ValueError for fields other than `SCHEMA` names: a programming error."""
        if set(fields) != set(SCHEMA[event]):
            raise ValueError(f"event {event} takes {SCHEMA[event]}, got {tuple(fields)}")
        record = {"event": event, "time": round(time.time(), 3), **fields}
        line = json.dumps(record, allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._track(record)
        if self.listener:
            self.listener(record)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def _track(self, record: Mapping[str, Any]) -> None:
        if record["event"] not in {"round_finished", "evaluation"}:
            return
        prefix = "train" if record["event"] == "round_finished" else "evaluation"
        values = {f"{prefix}/{k}": float(v) for k, v in record.items() if _is_number(v) and k not in {"round", "time"}}
        values |= {f"{prefix}/{k}": float(v) for k, v in (record.get("metrics") or {}).items() if _is_number(v)}
        for tracker in self.trackers:
            tracker.log(values, step=record["round"])


def read_events(path: Path) -> list[Event]:
    """All events of a run in order, each round and evaluation once: what was done again replaces what it replaced."""
    events: list[Event] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(event, dict) or event.get("event") not in SCHEMA:
            continue
        if event["event"] == "run_started":  # killed before there was anything to resume, and started again
            events = []
        elif event["event"] == "run_resumed":
            events = [e for e in events if not _belongs_after(e, event["round"])]
        elif event["event"] == "evaluation":  # killed before its numbers were in the checkpoint, and made again
            events = [e for e in events if (e["event"], e.get("round")) != ("evaluation", event["round"])]
        events.append(event)
    return events


def _belongs_after(event: Mapping[str, Any], finished: int) -> bool:
    if event["event"] in {"run_started", "run_resumed"}:
        return False
    return event["event"] == "run_finished" or bool(event["round"] > finished)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cut_broken_tail(path: Path) -> None:
    """Remove a last line without its newline: what a kill in the middle of a write leaves."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)


class _AccelerateTracker:
    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        self._tracker.finish()


def find_trackers(names: Iterable[str]) -> list[Any]:
    """The classes of accelerate.tracking by name. Raises UserError for one that is unknown or not installed."""
    names = list(names)
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(getattr(t, "value", t)) for t in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"unknown tracker {name!r}: {suggest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in available:
            raise UserError(f"tracker {name!r} is not installed: pip install {name}")
    return [LOGGER_TYPE_TO_CLASS[name] for name in names]


def open_trackers(names: Iterable[str], run: str, folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of accelerate.tracking by name, started. Raises UserError as `find_trackers` does."""
    opened: list[Tracker] = []
    for cls in find_trackers(names):
        tracker = cls(run, logging_dir=str(folder)) if cls.requires_logging_directory else cls(run)
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(_flat(config))
        opened.append(_AccelerateTracker(tracker))
    return opened


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return out
