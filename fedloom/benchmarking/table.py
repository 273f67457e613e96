"""A benchmark's table: a row for each cell, means and spreads over seeds; as CSV, LaTeX and a page.

What a run measured and what it cost stand side by side. Columns of `MEASURED` follow from the recipe alone, so that a
benchmark that was killed and carried on gives them again; `TRAFFIC` does but for a few bytes; `SPENT` is this machine's.
This file does not run anything.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.benchmarking.runner import Outcome

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One number of a run.

    Attributes:
        key: in the CSV; a second column `KEY_std` has the spread over seeds.
        title: over the column where people read it.
        read: the number in a summary, None where it has none.
        text: how people read it.
        better: whether less or more of it is better; "" for neither.
    """

    key: str
    title: str
    read: Callable[[Summary], float | None]
    text: Callable[[float], str]
    better: str = ""


def _own_loss(summary: Summary) -> float | None:
    """The mean over clients of each one's loss on its own test data."""
    losses = [c["loss"]["after"] for c in summary["per_client"].values() if c["loss"]["after"] is not None]
    return statistics.fmean(losses) if losses else None


def _worst(summary: Summary, what: str) -> float | None:
    worst = summary[what]["worst_client"]
    return None if worst is None else worst["after"]


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _count(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


MEASURED = (
    Column("score", "score", lambda s: s["score"]["after"], "{:.3f}".format, "more"),
    Column("score_worst_client", "worst client's score", lambda s: _worst(s, "score"), "{:.3f}".format, "more"),
    Column("loss_before", "loss before", lambda s: s["loss"]["before"], "{:.4f}".format),
    Column("loss", "loss", lambda s: s["loss"]["after"], "{:.4f}".format, "less"),
    Column("loss_own", "mean own loss", _own_loss, "{:.4f}".format, "less"),
    Column("loss_worst_client", "worst client's loss", lambda s: _worst(s, "loss"), "{:.4f}".format, "less"),
    Column("parameters", "parameters", lambda s: s["adapter"]["parameters"], _count),
    Column("train_tokens", "tokens", lambda s: s["cost"]["train_tokens"], _count),
    Column("train_flops", "FLOPs", lambda s: s["cost"]["train_flops"], _count, "less"),
    Column("failures", "failures", lambda s: s["failures"], "{:.0f}".format),
)
#: A message says how long its work took, so its length differs by a few bytes from run to run.
TRAFFIC = (
    Column(
        "upload_bytes", "up", lambda s: s["cost"]["upload_bytes"] - s["cost"]["evaluation_upload_bytes"], _size, "less"
    ),
    Column(
        "download_bytes",
        "down",
        lambda s: s["cost"]["download_bytes"] - s["cost"]["evaluation_download_bytes"],
        _size,
        "less",
    ),
)
SPENT = (
    Column("cpu_seconds", "CPU time", lambda s: s["cost"]["cpu_seconds"], "{:.0f} s".format),
    Column("wall_seconds", "time", lambda s: s["cost"]["wall_seconds"], "{:.0f} s".format),
    Column("peak_memory_bytes", "memory", lambda s: s["cost"]["peak_memory_bytes"], _size),
)
COLUMNS = (*MEASURED, *TRAFFIC, *SPENT)


@dataclass(frozen=True)
class Row:
    """A cell's numbers.

    Attributes:
        place: axis → point.
        chosen: what its pilot chose.
        seeds: how many runs are behind it.
        means, spreads: column → mean, and standard deviation over seeds (None with one seed).
    """

    place: dict[str, str]
    chosen: dict[str, Any]
    seeds: int
    means: dict[str, float | None]
    spreads: dict[str, float | None]
    trouble: str

    @property
    def name(self) -> str:
        return "/".join(self.place.values())

    def text(self, column: Column) -> str:
        """As people read it, with the spread where there is one."""
        mean, spread = self.means[column.key], self.spreads[column.key]
        if mean is None:
            return "–"
        said = column.text(mean)
        return f"{said} ± {column.text(spread)}" if spread else said


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row for each cell, in their order."""
    return [_row(outcome) for outcome in outcomes]


def _row(outcome: Outcome) -> Row:
    means: dict[str, float | None] = {}
    spreads: dict[str, float | None] = {}
    for column in COLUMNS:
        values = [column.read(summary) for summary in outcome.summaries.values()]
        numbers = [float(v) for v in values if v is not None and math.isfinite(v)]
        whole = bool(numbers) and len(numbers) == len(values)
        means[column.key] = statistics.fmean(numbers) if whole else None
        spreads[column.key] = statistics.stdev(numbers) if whole and len(numbers) > 1 else None
    return Row(outcome.cell.place, outcome.chosen, len(outcome.summaries), means, spreads, outcome.trouble)


def shown(found: Sequence[Row]) -> list[Column]:
    """The columns in which any row has a number that is not 0 everywhere."""
    return [c for c in COLUMNS if any(row.means[c.key] for row in found)]


def to_csv(found: Sequence[Row]) -> str:
    """All columns, numbers in full."""
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


def to_latex(found: Sequence[Row], caption: str) -> str:
    """A tabular with booktabs' rules, the best of each measured column in bold."""
    axes = list(found[0].place) if found else []
    columns = [c for c in shown(found) if c.key not in {"loss_before", "failures"}]
    finest = {c.key: best(found, c) for c in columns if c in MEASURED}
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{_escaped(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(axes)}{'r' * len(columns)}}}", r"\toprule",
        " & ".join(_escaped(t) for t in [*axes, *(c.title for c in columns)]) + r" \\", r"\midrule",
    ]  # fmt: skip
    for row in found:
        cells = []
        for column in columns:
            text = _escaped(row.text(column)).replace("±", r"$\pm$").replace("–", "--")
            mean = row.means[column.key]
            cells.append(rf"\textbf{{{text}}}" if mean is not None and mean == finest.get(column.key) else text)
        lines.append(" & ".join([*(_escaped(p) for p in row.place.values()), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def best(found: Sequence[Row], column: Column) -> float | None:
    """The best mean of a column; None where neither more nor less is better."""
    numbers = [row.means[column.key] for row in found]
    there = [n for n in numbers if n is not None]
    if not there or not column.better:
        return None
    return min(there) if column.better == "less" else max(there)


def _escaped(text: str) -> str:
    for mark in "&%$#_{}":
        text = text.replace(mark, f"\\{mark}")
    return text
