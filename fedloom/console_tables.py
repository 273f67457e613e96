"""What the terminal shows of benchmarks, and of runs side by side. It draws and decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from fedloom.benchmarking.columns import NAMED
from fedloom.benchmarking.declaration import Benchmark
from fedloom.benchmarking.runner import NOT_RUN
from fedloom.benchmarking.table import Row


def plan_table(benchmark: Benchmark) -> Table:
    """A benchmark's cells, with what the pilot chooses among."""
    table = Table(*benchmark.axes, "runs", "chosen in a pilot", box=None, pad_edge=False)
    for cell in benchmark.cells():
        for choice in cell.choices():
            cell.recipe(benchmark.seeds[0], choice)
        pilot = "; ".join(f"{key} of {', '.join(map(str, values))}" for key, values in cell.pilot.items())
        table.add_row(*cell.place.values(), str(len(benchmark.seeds)), pilot)
    return table


def benchmark_table(rows: Sequence[Row], wanted: Sequence[str]) -> Table:
    """A benchmark's numbers, those wanted that any row has, and what went wrong."""
    columns = [NAMED[key] for key in wanted if any(row.means[key] is not None for row in rows)]
    table = Table(box=None, pad_edge=False)
    for axis in rows[0].place if rows else ():
        table.add_column(axis, no_wrap=True, overflow="ignore")
    for column in columns:
        table.add_column(column.title, justify="right")
    for row in rows:
        table.add_row(*row.place.values(), *(row.text(c) for c in columns))
    missing = [row for row in rows if row.trouble == NOT_RUN]
    trouble = [f"{row.name}: {row.trouble}" for row in rows if row.trouble and row.trouble != NOT_RUN]
    trouble += [f"{len(missing)} of {len(rows)} cells are not run yet"] if missing else []
    table.caption = "\n".join(trouble) or None
    return table
