"""The commands that compare many runs: benchmark, compare. Thin, like those of runs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.app import command, note, out
from fedloom.common.logs import heard_by


@command
def benchmark(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a built-in benchmark, or a YAML file")],
    size: Annotated[str | None, typer.Option("--size", help="smoke, laptop or paper; the smallest by default")] = None,
    out_: Annotated[Path | None, typer.Option("--out", help="the folder; benchmarks/NAME-SIZE by default")] = None,
    only: Annotated[str, typer.Option("--only", help="run only cells whose name contains this; show all")] = "",
    dry: Annotated[bool, typer.Option("--dry-run", help="check every recipe and list the cells; run nothing")] = False,
) -> None:
    """Run a matrix of recipes and write its table; cells that are finished in the folder are not run again."""
    from fedloom.cli.benchmark_tables import benchmark_table, plan_table
    from fedloom.common.errors import RunFailed
    from fedloom.common.files import write_bytes, write_json
    from fedloom.experiment.benchmark.declaration import Benchmark
    from fedloom.experiment.benchmark.page import write_benchmark
    from fedloom.experiment.benchmark.ratios import lines, ratios
    from fedloom.experiment.benchmark.runner import NOT_RUN, run_benchmark
    from fedloom.experiment.benchmark.table import alike, rows, to_csv, to_latex

    chosen = Benchmark.load(name, size)
    size = size or next(iter(chosen.sizes), None)
    folder = out_ or Path("benchmarks") / "-".join(part for part in (chosen.name, size) if part)
    if dry:
        out.print(plan_table(chosen))
        return
    with heard_by(note):
        outcomes = run_benchmark(chosen, folder, only=only, size=size)
    found, stated = rows(outcomes), ratios(chosen, rows(outcomes))
    write_bytes(folder / "table.csv", to_csv(found).encode())
    write_bytes(folder / "table.tex", to_latex(found, chosen.description, list(alike(found).values())).encode())
    write_json(folder / "ratios.json", stated)
    out.print(benchmark_table(found, chosen.terminal))
    out.print(f"table    {folder / 'table.csv'}", markup=False)
    out.print(f"report   {write_benchmark(chosen, size, found, stated, folder)}", markup=False)
    for line in lines(stated):
        out.print(line, markup=False)
    if not any(outcome.measured for outcome in outcomes):
        cell = next((o for o in outcomes if o.trouble != NOT_RUN), outcomes[0])
        raise RunFailed(f"no cell has a result: {cell.cell.name}: {cell.trouble}; all are in {folder / 'table.csv'}")


@command
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="folders of finished runs, or a benchmark's folder")
    ],
    out_: Annotated[
        Path | None, typer.Option("--out", help="a folder for leaderboard.html and the table as CSV and LaTeX")
    ] = None,
) -> None:
    """Compare finished runs: scores, losses, worst client, cost, and the settings that differ."""
    from fedloom.cli.benchmark_tables import compare_table, settings_table
    from fedloom.common.errors import UserError
    from fedloom.common.files import write_bytes
    from fedloom.experiment.benchmark.compare import leaderboard
    from fedloom.experiment.benchmark.page import write_leaderboard
    from fedloom.experiment.benchmark.table import to_csv, to_latex

    if out_ is not None and out_.exists() and not out_.is_dir():
        raise UserError(f"{out_} is a file: name a folder with --out")
    board = leaderboard(runs)
    out.print(compare_table(board))
    out.print()
    out.print(settings_table(board) if board.differs else "the recipes are the same")
    if board.sentence:
        out.print(board.sentence, markup=False)
    if out_ is None:
        out.print("page     with --out FOLDER: leaderboard.html, and the table as CSV and LaTeX", markup=False)
        return
    caption = f"Ranked by {board.ranked_by}."
    write_bytes(out_ / "leaderboard.csv", to_csv(board.rows).encode())
    write_bytes(
        out_ / "leaderboard.tex", to_latex(board.rows, caption, [board.rows] if board.comparable else []).encode()
    )
    out.print(f"table    {out_ / 'leaderboard.csv'}", markup=False)
    out.print(f"report   {write_leaderboard(board, out_)}", markup=False)
