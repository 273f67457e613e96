"""`fedloom compare`: show finished runs side by side, and rank those that are comparable.

Two runs are comparable if they have the same data, split, test set and base model: the keys of `GROUND`. Ranks by score
also need the same keys of `ASKED`. Other runs are still shown side by side, and ranks count among the runs that share
these keys. A benchmark's folder gives one entry for each cell, with all of its seeds. This file runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedloom.common.errors import UserError
from fedloom.experiment.benchmark.columns import NAMED, Numbers, measured
from fedloom.experiment.benchmark.declaration import Benchmark
from fedloom.experiment.benchmark.runner import outcome
from fedloom.experiment.benchmark.table import Row, as_row
from fedloom.reporting import differences as settings
from fedloom.reporting.html import run_names
from fedloom.reporting.loaded_run import read_run

#: Two losses are comparable if these are the same: whole sections, and single keys.
GROUND_SECTIONS = ("data.", "split.")


GROUND = ("model.name", "model.revision", "evaluation.clients", "seed")


#: Two scores also need these to be the same.
ASKED = ("evaluation.suite", "evaluation.limit", "evaluation.max_new_tokens")


#: Keys of the sections above that do not change the data.
NOT_GROUND = {"data.license"}


@dataclass(frozen=True)
class Entry:
    """One run, or the runs of a cell, which differ only in their seed.

    Attributes:
        recipe: the recipe's dotted keys and values; `seed` has all seeds.
        events: the events of the first run.
        trouble: why there are no numbers.
    """

    name: str
    numbers: list[Numbers] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    events: Path | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    trouble: str = ""


@dataclass(frozen=True)
class Leaderboard:
    """Attributes:
    rows: in the order of their ranks, which are in `place`.
    differs: recipe key → its values, in the order of the rows.
    sentence: names the keys that make the runs not comparable; empty where there are none.
    ranked_by: the column that ranks.
    events: row's name → the events of its first run.
    """

    rows: list[Row]
    differs: dict[str, list[Any]]
    sentence: str
    ranked_by: str
    events: dict[str, Path]

    @property
    def comparable(self) -> bool:
        return not self.sentence


def leaderboard(paths: Sequence[Path]) -> Leaderboard:
    """Rank the runs at `paths`. Raises UserError if one is not a run or not finished, or if there are fewer than two."""
    entries = list(_entries(paths))
    finished = [entry for entry in entries if entry.numbers]
    if len(finished) < 2:
        raise UserError(
            f"there is {len(finished) or 'no'} finished run to compare: name two or more run folders, or a benchmark's "
            "folder with two finished cells"
        )
    made = {entry.name: as_row({"run": entry.name}, entry.numbers, entry.chosen, entry.trouble) for entry in entries}
    scored = all(made[entry.name].means["score"] is not None for entry in finished)
    ranked_by = "score" if scored else "loss"
    apart = [key for key in settings.find_differences([e.recipe for e in finished]) if _is_ground(key, scored)]
    order = _ordered(finished, made, apart, ranked_by)
    left = [(entry, "–") for entry in entries if not entry.numbers]
    ranked = [*order, *left]
    return Leaderboard(
        rows=[replace(made[e.name], place={"rank": rank, "run": e.name}) for e, rank in ranked],
        differs=settings.find_differences([entry.recipe for entry, _ in ranked]),
        sentence=_sentence(apart),
        ranked_by=ranked_by,
        events={entry.name: entry.events for entry in finished if entry.events is not None},
    )


def _is_ground(key: str, scored: bool) -> bool:
    named = key in GROUND or key.startswith(GROUND_SECTIONS) or (scored and key in ASKED)
    return named and key not in NOT_GROUND


def _ordered(
    entries: Sequence[Entry], made: Mapping[str, Row], apart: Sequence[str], by: str
) -> list[tuple[Entry, str]]:
    """Rank entries among those that are comparable. Equal numbers share a rank; an entry without a number has none."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(repr([entry.recipe.get(key) for key in apart]), []).append(entry)
    sign = -1.0 if NAMED[by].better == "more" else 1.0
    ranked: list[tuple[Entry, str]] = []
    for group in groups.values():
        numbers = {e.name: made[e.name].means[by] for e in group}
        there = sorted(sign * n for n in numbers.values() if n is not None)
        for entry in sorted(group, key=lambda e: (numbers[e.name] is None, sign * (numbers[e.name] or 0.0))):
            number = numbers[entry.name]
            known = number is not None and len(group) > 1
            ranked.append((entry, str(there.index(sign * (number or 0.0)) + 1) if known else "–"))
    return ranked


def _sentence(apart: Sequence[str]) -> str:
    if not apart:
        return ""
    keys = " and ".join([*([", ".join(apart[:-1])] if apart[:-1] else []), apart[-1]])
    verb = "differs" if len(apart) == 1 else "differ"
    return f"These runs are not all comparable: {keys} {verb}; ranks count among the runs that share them."


# ------------------------------------------------------------------ reading the folders


def _entries(paths: Sequence[Path]) -> Iterator[Entry]:
    for path, name in zip(paths, run_names(list(paths)), strict=True):
        if (path / "benchmark.json").is_file():
            yield from _cells(path, f"{name}/" if len(paths) > 1 else "")
        else:
            yield _run(path, name)


def _run(path: Path, name: str) -> Entry:
    """Read one run. Raises UserError if `path` is not a run, or the run is not finished."""
    run = read_run(path)
    numbers = measured(path)
    if numbers is None:
        of = f" of {run.headline['rounds']}" if run.headline.get("rounds") else ""
        raise UserError(
            f"the run {path} is not finished (round {run.rounds_done}{of}): finish it with `fedloom run {path} --resume`"
        )
    events = path / "events.jsonl"
    return Entry(name, [numbers], settings.flatten(run.recipe), events if events.is_file() else None)


def _cells(path: Path, prefix: str) -> Iterator[Entry]:
    """Read a benchmark's cells, also those that have not run. Raises UserError if its file cannot be read."""
    try:
        held = json.loads((path / "benchmark.json").read_text(encoding="utf-8"))
        benchmark = Benchmark.model_validate({k: v for k, v in held.items() if k != "size"})
    except (ValueError, AttributeError, ValidationError):
        raise UserError(
            f"{path / 'benchmark.json'} cannot be read: run `fedloom benchmark` in another folder"
        ) from None
    for cell in benchmark.cells():
        found = outcome(benchmark, cell, path)
        if not found.measured:
            yield Entry(f"{prefix}{cell.name}", trouble=found.trouble)
            continue
        folders = [path / "cells" / cell.name / str(seed) for seed in found.measured]
        recipe = settings.flatten(read_run(folders[0]).recipe)
        recipe["seed"] = recipe["seed"] if len(folders) == 1 else list(found.measured)
        yield Entry(
            f"{prefix}{cell.name}",
            list(found.measured.values()),
            recipe,
            folders[0] / "events.jsonl",
            found.chosen,
            found.trouble,
        )
