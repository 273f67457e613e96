"""Terminal tables of benchmarks and of compared runs. This file only formats."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from fedloom.experiment.benchmark.columns import NAMED
from fedloom.experiment.benchmark.compare import Leaderboard
from fedloom.experiment.benchmark.declaration import Benchmark
from fedloom.experiment.benchmark.runner import NOT_RUN, check
from fedloom.experiment.benchmark.table import Row, shown
from fedloom.reporting import differences as settings

#: Up to so many compared runs have a column each; more have a row each, with fewer numbers.
ACROSS = 4


#: The numbers of a table with a row for each run.
NARROWED = (
    "score", "loss_before", "loss", "loss_own", "loss_worst_client", "loss_spread", "train_tokens", "upload_bytes",
    "download_bytes", "wall_seconds",
)  # fmt: skip


def _grid(head: Sequence[str], body: Sequence[Sequence[str]], names: int) -> Table:
    """Build a table whose first `names` columns are names and the others numbers. Only titles wrap, cells never do."""
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(head):
        cells = [row[i] for row in body]
        folded = [title] if i < names else title.split()
        width = max((len(text) for text in [*folded, *cells]), default=0)
        table.add_column(escape(title), justify="left" if i < names else "right", min_width=width)
    for row in body:
        table.add_row(*map(escape, row))
    return table


def plan_table(benchmark: Benchmark) -> Table:
    """List a benchmark's cells, the values that its pilot chooses from, and cells that are refused. Raises UserError."""
    table = Table(*benchmark.axes, "runs", "chosen in a pilot", box=None, pad_edge=False)
    refused = check(benchmark)
    for cell in benchmark.cells():
        pilot = "; ".join(f"{key} of {', '.join(map(str, values))}" for key, values in cell.pilot.items())
        table.add_row(*cell.place.values(), str(len(benchmark.seeds)), pilot)
    if refused:
        table.caption = escape("\n".join(f"{name} will have no result: {why}" for name, why in refused.items()))
    return table


def benchmark_table(rows: Sequence[Row], wanted: Sequence[str]) -> Table:
    """Build the table of a benchmark: the wanted columns that any row has, and the errors of its cells."""
    columns = [NAMED[key] for key in wanted if any(row.means[key] is not None for row in rows)]
    axes = list(rows[0].place) if rows else []
    body = [[*row.place.values(), *(row.text(c) for c in columns)] for row in rows]
    table = _grid([*axes, *(c.title for c in columns)], body, names=len(axes))
    table.caption = _troubles(rows)
    return table


def compare_table(board: Leaderboard) -> Table:
    """Build the table of compared runs: a column for each of up to `ACROSS` runs, else a row for each."""
    rows = board.rows
    if len(rows) > ACROSS:
        return benchmark_table(rows, NARROWED)
    columns = shown(rows)
    body = [["rank", *(row.place["rank"] for row in rows)]]
    body += [[c.title, *(row.text(c) for row in rows)] for c in columns]
    table = _grid([f"by {board.ranked_by}", *(row.name for row in rows)], body, names=1)
    table.caption = _troubles(rows)
    return table


def settings_table(board: Leaderboard) -> Table:
    """Build the table of settings that differ: all of them for few runs, else each run's unusual ones."""
    names = [row.name for row in board.rows]
    if len(names) > ACROSS:
        lines = [settings.line(values) or "as most" for values in settings.find_unusual(board.differs)]
        return _grid(["run", "settings of its own"], list(zip(names, lines, strict=False)), names=2)
    body = [[key, *map(settings.text, values)] for key, values in board.differs.items()]
    return _grid(["setting", *names], body, names=1)


def _troubles(rows: Sequence[Row]) -> str | None:
    missing = [row for row in rows if row.trouble == NOT_RUN]
    trouble = [f"{row.name}: {row.trouble}" for row in rows if row.trouble and row.trouble != NOT_RUN]
    trouble += [f"{len(missing)} of {len(rows)} cells are not run yet"] if missing else []
    return escape("\n".join(trouble)) or None
