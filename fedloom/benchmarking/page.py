"""A benchmark's page: its table, what each cell gives against what it costs, and losses over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.benchmarking.columns import COLUMNS, MEASURED
from fedloom.benchmarking.declaration import Benchmark
from fedloom.benchmarking.ratios import lines
from fedloom.benchmarking.table import Row, best, shown
from fedloom.report import charts, scatter
from fedloom.report.html import NARROW, WIDE, figure, write_page
from fedloom.tracking import read_events

#: Lines in one chart over rounds.
MOST_LINES = 9

#: Where scores and losses are set against what they cost: column, heading, axis, unit.
COSTS = (
    ("upload_bytes", "against traffic", "bytes that clients sent, evaluation aside", "size"),
    ("train_flops", "against compute", "floating-point operations of training", "short"),
)


def write_benchmark(
    benchmark: Benchmark, size: str | None, found: Sequence[Row], stated: Mapping[str, float | None], out: Path
) -> Path:
    """`out`/benchmark.html; returns its path."""
    columns = shown(found)
    note = "Means over seeds, ± one standard deviation. " if any(row.seeds > 1 for row in found) else "One seed. "
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
            "best": {c.key: best(found, c) for c in columns if c in MEASURED},
            "note": f"{note}Traffic without that of evaluation; time and memory are this machine's.",
            "ratios": lines(stated),
            "clouds": _clouds(found),
            "lines": _lines(benchmark, found, out),
            "run": None,
        },
    )


def _clouds(found: Sequence[Row]) -> list[tuple[str, str, tuple[Any, Any], list[tuple[str, str]]]]:
    """Score, where every row has one, and loss, each against each cost."""
    wanted = [c for c in COLUMNS if c.key in {"score", "loss"}]
    clouds = []
    groups = {row.name.rpartition("/")[0]: "" for row in found}
    groups = {name: f"c{i % charts.COLOURED}" for i, name in enumerate(groups)}
    for column in wanted:
        unit = "percent" if column.key == "score" else "loss"
        for key, heading, axis, x_unit in COSTS:
            points = [
                scatter.Point(_short(row), row.means[key] or 0.0, y, groups[row.name.rpartition("/")[0]])
                for row in found
                if (y := row.means[column.key]) is not None and row.means[key] is not None
            ]
            if len(points) < 2:
                continue
            title = f"{column.title.capitalize()} {heading}"
            chart = scatter.Scatter(title, axis, x_unit, unit, tuple(points))
            drawn = scatter.draw(chart, WIDE, 380), scatter.draw(chart, NARROW, 300)
            told = "Higher is better." if column.better == "more" else "Lower is better."
            clouds.append((title, f"{told} Each point is a row of the table.", drawn, list(groups.items())))
    return clouds


def _short(row: Row) -> str:
    return row.name.rpartition("/")[2]


def _lines(benchmark: Benchmark, found: Sequence[Row], out: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """A chart over rounds for each point of the axes before the last; of more lines than can be told apart, the best."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        if row.seeds and row.means["loss"] is not None:
            groups.setdefault(row.name.rpartition("/")[0], []).append(row)
    drawn: list[tuple[str, Mapping[str, Any]]] = []
    for name, group in groups.items():
        kept = sorted(group, key=lambda r: r.means["loss"] or 0.0)[:MOST_LINES]
        events = {_short(row): read_events(path) for row in kept if (path := _first(benchmark, row, out)) is not None}
        chart = charts.overlay_chart(events, "loss")
        view = figure(chart, 340) if chart is not None else None
        if view is not None:
            more = f", the best {MOST_LINES} of {len(group)}" if len(group) > MOST_LINES else ""
            drawn.append((f"{name + ': ' if name else ''}loss over rounds{more}", view))
    return drawn


def _first(benchmark: Benchmark, row: Row, out: Path) -> Path | None:
    paths = (out / "cells" / row.name / str(seed) / "events.jsonl" for seed in benchmark.seeds)
    return next((path for path in paths if path.is_file()), None)
