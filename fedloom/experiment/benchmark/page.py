"""Write a benchmark's page and a leaderboard: a table of runs, plots of quality against cost, and losses over rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.experiment.benchmark.columns import NAMED
from fedloom.experiment.benchmark.compare import Leaderboard
from fedloom.experiment.benchmark.declaration import Benchmark
from fedloom.experiment.benchmark.ratios import lines
from fedloom.experiment.benchmark.table import Row, alike, before, bests, shown
from fedloom.federation.record.events import read_events
from fedloom.reporting import charts, scatter
from fedloom.reporting import differences as settings
from fedloom.reporting.html import NARROW, WIDE, figure, write_page

#: The most lines in one chart over rounds.
MOST_LINES = 9


#: Up to so many runs, a table shows the settings that differ. With more, each run has one line with its own settings.
MOST_SIDE_BY_SIDE = 6


#: The costs that plots show scores and losses against: column, heading, axis, unit.
COSTS = (
    ("upload_bytes", "against traffic", "bytes that clients sent, evaluation aside", "size"),
    ("train_flops", "against compute", "floating-point operations of training", "short"),
)


OF_MACHINE = "Traffic excludes evaluation; time and memory are those of this machine."


#: Returns a row's label or colour group in a drawing.
Names = Callable[[Row], str]


def write_benchmark(
    benchmark: Benchmark, size: str | None, found: Sequence[Row], stated: Mapping[str, float | None], out: Path
) -> Path:
    """Write `out`/benchmark.html; return its path."""
    columns = shown(found)
    groups = alike(found)
    events = {row.name: path for row in found if (path := _first(benchmark, row, out)) is not None}
    drawn = []
    for name, group in groups.items():
        heading = f"{name}: loss over rounds" if name else "Loss over rounds"
        drawn += _over_rounds(heading, group, {row.name: _short(row) for row in group}, events, "loss")
    return write_page(
        out / "benchmark.html",
        "benchmark.html",
        {
            "title": benchmark.name,
            "description": benchmark.description,
            "size": size,
            "axes": list(benchmark.axes),
            "columns": columns,
            "rows": found,
            "best": bests(groups.values(), columns),
            "note": f"{_of_seeds(found)}{OF_MACHINE}",
            "ratios": lines(stated),
            "clouds": _clouds(found, benchmark.judged_by, _short, before),
            "lines": drawn,
            "run": None,
        },
    )


def write_leaderboard(board: Leaderboard, out: Path) -> Path:
    """Write `out`/leaderboard.html; return its path."""
    found = board.rows
    columns = shown(found)
    names = {row.name: row.name for row in found}
    few = len(found) <= charts.COLOURED
    side_by_side = len(found) <= MOST_SIDE_BY_SIDE
    return write_page(
        out / "leaderboard.html",
        "leaderboard.html",
        {
            "title": f"{len(found)} runs",
            "sentence": board.sentence,
            "ranked_by": board.ranked_by,
            "axes": list(found[0].place),
            "columns": columns,
            "rows": found,
            "best": bests([found] if board.comparable else [], columns),
            "note": f"{_of_seeds(found)}{OF_MACHINE}",
            "clouds": _clouds(found, "loss", lambda row: row.name, lambda row: row.name if few else ""),
            "lines": [
                *_over_rounds("Loss over rounds", found, names, board.events, "loss"),
                *_over_rounds("Score over rounds", found, names, board.events, "score"),
            ],
            "names": list(names),
            "differing": [(k, [settings.text(v) for v in values]) for k, values in board.differs.items()]
            if side_by_side
            else [],
            "unusual": []
            if side_by_side
            else list(zip(names, map(settings.line, settings.find_unusual(board.differs)), strict=False)),
            "run": None,
        },
    )


def _of_seeds(found: Sequence[Row]) -> str:
    return "Means over seeds, ± one standard deviation. " if any(row.seeds > 1 for row in found) else "One seed. "


def _clouds(
    found: Sequence[Row], judged_by: str, label: Names, group: Names
) -> list[tuple[str, str, tuple[Any, Any], list[tuple[str, str]]]]:
    """Plot the score and `judged_by` against each cost: (heading, caption, drawings, colours)."""
    clouds = []
    groups = {name: f"c{i % charts.COLOURED}" for i, name in enumerate(dict.fromkeys(map(group, found)))}
    for column in (NAMED["score"], NAMED[judged_by]):
        unit = "percent" if column.key == "score" else "loss"
        for key, heading, axis, x_unit in COSTS:
            points = [
                scatter.Point(label(row), x, y, groups[group(row)])
                for row in found
                if (y := row.means[column.key]) is not None and (x := row.means[key]) is not None
            ]
            if len(points) < 2:
                continue
            title = f"{column.title.capitalize()} {heading}"
            chart = scatter.Scatter(title, axis, x_unit, unit, tuple(points))
            drawn = scatter.draw(chart, WIDE, 380), scatter.draw(chart, NARROW, 300)
            better = "Higher is better." if column.better == "more" else "Lower is better."
            clouds.append((title, f"{better} Each point is a row of the table.", drawn, list(groups.items())))
    return clouds


def _over_rounds(
    heading: str, found: Sequence[Row], labels: Mapping[str, str], events: Mapping[str, Path], key: str
) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Draw a chart over rounds, or none without data; of more than `MOST_LINES` runs only the best."""
    there = [row for row in found if row.name in events and row.means[key] is not None]
    sign = -1 if NAMED[key].better == "more" else 1
    kept = sorted(there, key=lambda row: sign * (row.means[key] or 0.0))[:MOST_LINES]
    kept = [row for row in there if row in kept]
    chart = charts.overlay_chart({labels[row.name]: read_events(events[row.name]) for row in kept}, key)
    view = figure(chart, 340) if chart is not None else None
    if view is None:
        return []
    more = f", the best {MOST_LINES} of {len(there)}" if len(there) > MOST_LINES else ""
    what = "Test loss" if key == "loss" else "Score"
    return [(heading + more, f"{what} of all clients together, after each evaluated round, of the first seed.", view)]


def _short(row: Row) -> str:
    return row.name.rpartition("/")[2]


def _first(benchmark: Benchmark, row: Row, out: Path) -> Path | None:
    paths = (out / "cells" / row.name / str(seed) / "events.jsonl" for seed in benchmark.seeds)
    return next((path for path in paths if row.seeds and path.is_file()), None)
