"""Read a run folder for a report: the files that exist, and a message for each missing one.

A finished run has a summary. For an interrupted run, `headline` computes the same keys from its events. This file does
not know how a page shows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired

import yaml

from fedloom.common.errors import UserError
from fedloom.common.yaml import load_yaml
from fedloom.federation.record.events import Event, read_events
from fedloom.reporting.summary_types import LossSummary, Pair, WorstClient

#: Files of a run folder → the parts of a report that need them.
FILES = {
    "recipe.yaml": "the recipe",
    "events.jsonl": "the curves, the rounds and the failures",
    "summary.json": "the whole cost, the data notes and the environment",
    "split.json": "the split",
    "answers.json": "answers before and after",
}


class Measured(LossSummary):
    """Loss or score of a run so far; `questions` once there is an evaluation."""

    questions: NotRequired[int]


@dataclass(frozen=True)
class LoadedRun:
    """The content of a run folder.

    Attributes:
        recipe: the resolved recipe; `recipe_text` is the file's text.
        events: in order, each finished round once.
        summary, split, answers: the JSON files, empty where they are missing.
        missing: file → why it could not be read.
    """

    path: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    events: list[Event]
    summary: Mapping[str, Any]
    split: Mapping[str, Any]
    answers: Mapping[str, Any]
    missing: dict[str, str]

    def events_of(self, event: str) -> list[Event]:
        """Return the events of one kind, in order."""
        return [e for e in self.events if e["event"] == event]

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def rounds_done(self) -> int:
        return max((e["round"] for e in self.events_of("round_finished")), default=0)

    @cached_property
    def headline(self) -> Mapping[str, Any]:
        """summary.json; of an unfinished run, the same keys computed from its events and recipe."""
        return self.summary or self._partial_summary()

    @property
    def privacy(self) -> Mapping[str, Any]:
        """The privacy guarantee; of an unfinished run, its settings and the last round's ε. Empty without privacy."""
        settings = self.recipe.get("privacy") or {}
        rounds = self.events_of("round_finished")
        spent = rounds[-1]["metrics"] if rounds and settings else {}
        return {**settings, **spent, **(self.headline.get("privacy") or {})}

    @property
    def name(self) -> str:
        return str(self.headline.get("name") or self.path.resolve().name)

    @property
    def client_names(self) -> list[str]:
        """All clients in table order: the split's, or that of the first evaluation."""
        if self.split.get("clients"):
            return [client["client"] for client in self.split["clients"]]
        evaluations = self.events_of("evaluation")
        return list(evaluations[0]["clients"]) if evaluations else []

    def worst_client(self, key: str) -> str | None:
        """Return the client with the worst final `key` (loss or score), by the summary or the last evaluation."""
        named = (self.headline.get(key) or {}).get("worst_client") or {}
        return named.get("client")

    def _partial_summary(self) -> Mapping[str, Any]:
        started = (self.events_of("run_started") or [{}])[0]
        updates = self.events_of("client_update")
        evaluations = self.events_of("evaluation")
        clients = started.get("clients")
        recipe = self.recipe
        return {
            "name": started.get("name") or recipe.get("name"),
            "description": recipe.get("description"),
            "algorithm": started.get("algorithm") or recipe.get("algorithm", {}).get("name"),
            "corpus": started.get("corpus") or recipe.get("data", {}).get("corpus"),
            "model": started.get("model") or recipe.get("model", {}).get("name"),
            "adapter": {"method": recipe.get("adapter", {}).get("method"), "parameters": started.get("parameters")},
            "clients": len(clients) if isinstance(clients, list) else clients,
            "rounds": started.get("rounds") or recipe.get("federation", {}).get("rounds"),
            "seed": recipe.get("seed"),
            "score": _before_after(evaluations, "score"),
            "loss": _before_after(evaluations, "loss"),
            "failures": len(self.events_of("client_failed")),
            "skipped_steps": sum(e["skipped_steps"] for e in updates),
            "cost": {
                "upload_bytes": sum(e["upload_bytes"] for e in updates),
                "download_bytes": sum(e["download_bytes"] for e in updates),
                "steps": sum(e["steps"] for e in updates),
                "wall_seconds": self.events[-1]["time"] - self.events[0]["time"] if self.events else None,
            },
            "per_client": _per_client(evaluations),
        }


def read_run(path: Path) -> LoadedRun:
    """Read the run folder at `path`. Raises UserError where there is none, or where it has none of a run's files."""
    if not path.is_dir():
        raise UserError(f"there is no run folder {path}: give a folder that `fedloom run` wrote, such as runs/NAME")
    if not any((path / name).is_file() for name in ("recipe.yaml", "events.jsonl", "summary.json")):
        raise UserError(
            f"{path} is not a run folder: it has no recipe.yaml, events.jsonl or summary.json; "
            "give a folder that `fedloom run` wrote, such as runs/NAME"
        )
    missing: dict[str, str] = {}
    text = _read(path, "recipe.yaml", missing)
    return LoadedRun(
        path=path,
        recipe=_parsed(text, "recipe.yaml", missing),
        recipe_text=text,
        events=read_events(path / "events.jsonl") if _read(path, "events.jsonl", missing) else [],
        summary=_parsed(_read(path, "summary.json", missing), "summary.json", missing),
        split=_parsed(_read(path, "split.json", missing), "split.json", missing),
        answers=_parsed(_read(path, "answers.json", missing), "answers.json", missing),
        missing=missing,
    )


def _read(path: Path, name: str, missing: dict[str, str]) -> str:
    file = path / name
    if not file.is_file():
        missing[name] = "is not there"
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        missing[name] = "is empty"
    return text


def _parsed(text: str, name: str, missing: dict[str, str]) -> Mapping[str, Any]:
    """Parse the mapping in `text`. Where that fails, return an empty one and note the file in `missing`."""
    if not text.strip():
        return {}
    try:
        value = load_yaml(text) if name.endswith(".yaml") else json.loads(text)
    except (yaml.YAMLError, json.JSONDecodeError):
        value = None
    if isinstance(value, dict):
        return value
    missing[name] = "cannot be read"
    return {}


def _before_after(evaluations: list[Event], key: str) -> Measured:
    """Return the first and the last value of `key`, over all clients and for the worst one (highest loss, lowest score)."""
    if not evaluations:
        return {"before": None, "after": None, "worst_client": None}
    first, last = evaluations[0], evaluations[-1]
    ends = {c: v[key] for c, v in last["clients"].items() if v.get(key) is not None}
    worst: WorstClient | None = None
    if ends and last is not first:
        client = (max if key == "loss" else min)(ends, key=lambda c: ends[c])
        worst = {"client": client, "before": first["clients"].get(client, {}).get(key), "after": ends[client]}
    after = last[key] if last is not first else None
    return {"before": first[key], "after": after, "worst_client": worst, "questions": last["questions"]}


def _per_client(evaluations: list[Event]) -> dict[str, dict[str, Pair]]:
    if not evaluations:
        return {}
    first, last = evaluations[0]["clients"], evaluations[-1]["clients"]

    def pair(client: str, key: str) -> Pair:
        after = last.get(client, {}).get(key) if len(evaluations) > 1 else None
        return {"before": first.get(client, {}).get(key), "after": after}

    return {client: {"loss": pair(client, "loss"), "score": pair(client, "score")} for client in first}
