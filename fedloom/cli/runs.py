"""The commands on single runs: thin wrappers of the functions that Python code calls.

Each command ends by naming the file to read next. Exit codes: 0 done; 1 the work failed, with one message that says what
was kept; 2 a mistake in the input, with one message that says how to fix it; 130 interrupted, can be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedloom.cli.app import Overrides, RecipeName, RunArgument, adapter_folder, command, err, note, out, show_checks
from fedloom.common.errors import UserError
from fedloom.common.logs import heard_by
from fedloom.recipe.overrides import parse_overrides

if TYPE_CHECKING:
    pass


@command
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out_: Annotated[Path | None, typer.Option("--out", help="the run's folder; runs/NAME by default")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint in the folder")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in the folder")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print the result only")] = False,
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", help="where the clients run: simulator, ray, or distributed on this machine"),
    ] = None,
) -> None:
    """Run a recipe: fine-tune, evaluate, report."""
    from fedloom.cli.console import Display
    from fedloom.federation.record.run_folder import recipe_and_folder

    values = parse_overrides(overrides or []) | ({"runtime.name": runtime} if runtime else {})
    chosen, folder = recipe_and_folder(recipe, values, out_, resume)
    with Display(err, quiet=quiet) as display:
        from fedloom.experiment.run import run as run_recipe

        result = run_recipe(chosen, folder, resume=resume, overwrite=overwrite, watch=display.watch())
    from fedloom.cli.console import result_table

    out.print(result_table(result.summary))
    out.print(f"adapter  {adapter_folder(result.folder)}", markup=False)
    out.print(f"report   {result.report}", markup=False)


@command
def recipes() -> None:
    """List the built-in recipes."""
    from fedloom.recipe.library import builtin_recipes
    from fedloom.recipe.recipe import Recipe

    table = Table("recipe", "what it shows", "corpus", "algorithm", box=None, pad_edge=False)
    for name, path in builtin_recipes().items():
        recipe = Recipe.load(path)
        table.add_row(name, recipe.description, str(recipe.data.corpus or recipe.data.path), recipe.algorithm.name)
    out.print(table)
    out.print("run one with: fedloom run RECIPE; look at one with: fedloom recipe RECIPE", markup=False)


@command
def recipe_(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe with every default written out, ready to be saved and changed."""
    from fedloom.recipe.recipe import Recipe

    out.print(Recipe.load(recipe, parse_overrides(overrides or [])).to_yaml(), markup=False, end="")


@command
def algorithms(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="one algorithm: its page, options and paper")
    ] = None,
) -> None:
    """List the algorithms with their costs and guarantees; with a name, print that algorithm's page."""
    from fedloom.algorithms import catalogue
    from fedloom.common import registry

    found, troubles = ([catalogue.entry(name)], []) if name else catalogue.entries(lenient=True)
    for line in catalogue.page(found[0]) if name else [*catalogue.table(found), "", *catalogue.legend()]:
        out.print(line, markup=False)
    for trouble in troubles:
        err.print(f"left out: {trouble}", markup=False)
    for sentence in registry.notes():
        note(sentence)
    if not name:
        out.print("one of them: fedloom algorithms NAME; all of them: docs/algorithms/README.md", markup=False)


@command
def split(
    recipe: RecipeName,
    overrides: Overrides = None,
    out_: Annotated[Path, typer.Option("--out", help="the picture to write: .svg, .png or .html")] = Path("split.svg"),
) -> None:
    """Show how a recipe's corpus is split among clients; trains nothing."""
    from fedloom.cli.console import split_rows
    from fedloom.data.loading import load_data
    from fedloom.data.splitters import partition, tabulate_split
    from fedloom.recipe.recipe import Recipe
    from fedloom.reporting.charts import split_picture

    chosen = Recipe.load(recipe, parse_overrides(overrides or []))
    with heard_by(note):
        corpus, resolved = load_data(chosen)
    described = tabulate_split(corpus, partition(corpus, resolved, chosen.seed))
    out.print(split_rows(described))
    out.print(f"{corpus.name}: {len(corpus.examples):,} examples from {corpus.source} ({corpus.license})", markup=False)
    out.print(f"picture  {split_picture(described, out_)}", markup=False)


@command
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="a run's folder, an adapter, or a model")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="whose data and evaluation to use; a run brings its own")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change the recipe, e.g. evaluation.limit=50")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="skills, gsm or multiple-choice on the recipe's held-out data (its own by default), or a public benchmark: "
            "gsm8k, humaneval, humaneval-x, mmlu, medmcqa, helm-mini",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="take only the first LIMIT questions of each task; all by default"),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=0, help="answered examples in front; the benchmark's own number by default"),
    ] = None,
    allow_unsafe: Annotated[
        bool, typer.Option("--allow-unsafe", help="run a model's programs as yourself where no sandbox works")
    ] = False,
    client: Annotated[
        str | None, typer.Option("--client", help="a client's own result, after a personal algorithm")
    ] = None,
    out_: Annotated[Path | None, typer.Option("--out", help="write the numbers as JSON as well")] = None,
) -> None:
    """Measure a run's result, an adapter or a plain model: held-out loss and score, or a public benchmark."""
    from fedloom.cli.console import evaluation_table, suite_table
    from fedloom.experiment.evaluate import evaluate as measure
    from fedloom.experiment.evaluate import evaluate_suite, measured_by_tasks

    values = parse_overrides(overrides or [])
    if suite is not None and measured_by_tasks(suite):
        with heard_by(note):
            scores = evaluate_suite(
                target, suite, recipe, values, client, limit=limit, shots=shots, allow_unsafe=allow_unsafe
            )
        out.print(suite_table(scores))
        numbers: Mapping[str, object] = scores
    else:
        if shots is not None or allow_unsafe:
            option = "--shots" if shots is not None else "--allow-unsafe"
            raise UserError(f"{option} is for public benchmarks: name one with --suite (docs/evaluation.md)")
        values |= {"evaluation.suite": suite} if suite else {}
        values |= {"evaluation.limit": limit} if limit else {}
        with heard_by(note):
            measured = measure(target, recipe, values, client)
        out.print(evaluation_table(measured))
        numbers = measured
    if out_ is not None:
        from fedloom.common.files import write_json

        write_json(out_, numbers)
        out.print(f"numbers  {out_}", markup=False)


@command
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="one run's folder, or several to compare")],
    out_: Annotated[
        Path | None, typer.Option("--out", help="the page; report.html in the run's folder by default")
    ] = None,
) -> None:
    """Write a run's report again, or one page that compares several runs."""
    from fedloom.reporting.html import report_many, write_report

    alone = len(runs) == 1 and out_ is None
    page = write_report(runs[0]) if alone else report_many(runs, out_ or Path("comparison.html"))
    out.print(f"report   {page}", markup=False)


@command
def export(
    run: RunArgument,
    format_: Annotated[
        str,
        typer.Option("--format", help="peft (the adapter), merged (a plain model) or gguf (one file for llama.cpp)"),
    ] = "peft",
    out_: Annotated[
        Path | None, typer.Option("--out", help="the folder to write; RUN/export-FORMAT by default")
    ] = None,
    client: Annotated[str | None, typer.Option("--client", help="a client's own result")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="of a gguf file: f32, f16, bf16 or q8_0; f16 by default")
    ] = None,
) -> None:
    """Export a run's result for other programs."""
    from fedloom.reporting.export import export_run

    with heard_by(note):
        folder = export_run(run, format_, out_ or run / f"export-{format_}", client, dtype)
    out.print(f"{format_:8} {folder}", markup=False)


@command
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]…", help="built-in models, corpora, or all of them: all")
    ] = None,
    clear: Annotated[
        str | None,
        typer.Option("--clear", help="delete from the cache: carriers, models, tokenised, prefix, compiled or all"),
    ] = None,
) -> None:
    """Download built-in models and corpora into the cache, for use without a network; installs nothing."""
    from fedloom.cli.fetch import fetch_named, list_fetchable
    from fedloom.common.cache_folder import clear_cache

    if clear is not None:
        out.print(f"cleared  {clear_cache(clear)}", markup=False)
    elif not names:
        table = Table("name", "what", "in the cache", box=None, pad_edge=False)
        for name, what, there in list_fetchable():
            table.add_row(name, what, "yes" if there else "no")
        out.print(table)
    for name in names or []:
        with heard_by(note):
            place = fetch_named(name)
        out.print(f"fetched  {place}", markup=False)


@command
def doctor() -> None:
    """Check this machine: versions, cores, memory, disk, cache, network, and how to fix what fails."""
    from fedloom.runtimes.doctor import checks

    show_checks(checks())
