"""Runs as rows, with means and standard deviations over seeds, for CSV, LaTeX, pages and terminals.

A row is a cell of a benchmark or a single run. This file does not run anything.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.experiment.benchmark.columns import COLUMNS, MEASURED, Column, Numbers
from fedloom.experiment.benchmark.runner import Outcome


@dataclass(frozen=True)
class Row:
    """The numbers of a cell, or of one run.

    Attributes:
        name: the cell's, or the run's.
        place: axis → point; for a run, its name.
        chosen: what its pilot chose.
        seeds: the number of runs.
        means, spreads: column → mean, and standard deviation over seeds (None with one seed).
    """

    name: str
    place: dict[str, str]
    chosen: dict[str, Any]
    seeds: int
    means: dict[str, float | None]
    spreads: dict[str, float | None]
    trouble: str

    def text(self, column: Column) -> str:
        """Format the mean for people, with the standard deviation where there is one."""
        mean, spread = self.means[column.key], self.spreads[column.key]
        if mean is None:
            return "–"
        said = column.text(mean)
        return f"{said} ± {column.text(spread)}" if spread else said


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return a row for each cell, in the same order."""
    return [as_row(o.cell.place, list(o.measured.values()), o.chosen, o.trouble) for o in outcomes]


def as_row(place: Mapping[str, str], runs: Sequence[Numbers], chosen: Mapping[str, Any], trouble: str = "") -> Row:
    """Build a row from the numbers of runs that differ only in their seed."""
    means: dict[str, float | None] = {}
    spreads: dict[str, float | None] = {}
    for column in COLUMNS:
        values = [column.read(numbers) for numbers in runs]
        numbers = [v for v in values if v is not None and math.isfinite(v)]
        whole = bool(numbers) and len(numbers) == len(values)
        means[column.key] = statistics.fmean(numbers) if whole else None
        spreads[column.key] = statistics.stdev(numbers) if whole and len(numbers) > 1 else None
    return Row("/".join(place.values()), dict(place), dict(chosen), len(runs), means, spreads, trouble)


def shown(found: Sequence[Row]) -> list[Column]:
    """Return the columns in which any row has a number other than 0."""
    return [c for c in COLUMNS if any(row.means[c.key] for row in found)]


def to_csv(found: Sequence[Row]) -> str:
    """Write all columns as CSV, with numbers in full precision."""
    axes = list(found[0].place) if found else []
    numbers = [key for c in COLUMNS for key in (c.key, f"{c.key}_std")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*axes, "seeds", "chosen", *numbers, "trouble"])
    for row in found:
        values = [value for c in COLUMNS for value in (row.means[c.key], row.spreads[c.key])]
        chosen = " ".join(f"{k}={v}" for k, v in row.chosen.items())
        cells = ["" if v is None else repr(v) for v in values]
        writer.writerow([*row.place.values(), row.seeds, chosen, *cells, row.trouble])
    return out.getvalue()


def to_latex(found: Sequence[Row], caption: str, compared: Sequence[Sequence[Row]]) -> str:
    """Write a LaTeX table with booktabs' rules.

    The best mean of each measured column is bold, in each group of `compared`. A row with missing runs shows how many
    seeds it has.
    """
    most = max((row.seeds for row in found), default=0)
    axes = list(found[0].place) if found else []
    columns = [c for c in shown(found) if c.key not in {"loss_before", "failures"}]
    finest = bests(compared, columns)
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{_escaped(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(axes)}{'r' * len(columns)}}}", r"\toprule",
        " & ".join(_escaped(t) for t in [*axes, *(c.title for c in columns)]) + r" \\", r"\midrule",
    ]  # fmt: skip
    for row in found:
        cells = []
        for column in columns:
            text = _escaped(row.text(column)).replace("±", r"$\pm$").replace("–", "--")
            cells.append(rf"\textbf{{{text}}}" if (row.name, column.key) in finest else text)
        *axes_before, last = row.place.values()
        places = [*axes_before, last if row.seeds in (0, most) else f"{last} ({row.seeds} of {most} seeds)"]
        lines.append(" & ".join([*map(_escaped, places), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def before(row: Row) -> str:
    """Return the points of all axes but the last. A benchmark compares along the last one: one corpus, many algorithms."""
    return "/".join(list(row.place.values())[:-1])


def alike(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows that are comparable, by the points that they share."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(before(row), []).append(row)
    return groups


def bests(compared: Iterable[Sequence[Row]], columns: Sequence[Column]) -> set[tuple[str, str]]:
    """Return (row's name, column's key) of the best mean in each group, for the columns of `MEASURED`."""
    found = set()
    for group in compared:
        for column in columns:
            finest = best(group, column) if column in MEASURED else None
            if finest is not None:
                found |= {
                    (row.name, column.key) for row in group if row.means[column.key] == finest and not row.trouble
                }
    return found


def best(found: Sequence[Row], column: Column) -> float | None:
    """Return the best mean of a column among rows with all their runs; None if the column has no better direction."""
    numbers = [row.means[column.key] for row in found if not row.trouble]
    there = [n for n in numbers if n is not None]
    if not there or not column.better:
        return None
    return min(there) if column.better == "less" else max(there)


def _escaped(text: str) -> str:
    for mark in "&%$#_{}":
        text = text.replace(mark, f"\\{mark}")
    return text
