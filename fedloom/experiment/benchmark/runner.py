"""Run a benchmark's cells, the cheapest first, and resume a benchmark that was killed.

    OUT/benchmark.json              what is run: written first, and compared with the request on resume
    OUT/pilots/CELL/k/              the short run of the k-th choice; chosen.json next to them has the choice
    OUT/cells/CELL/SEED/            a run's folder, as `fedloom run` writes it

A run that has a summary is finished. Any other run resumes from its checkpoint, so a benchmark that was killed gives
the same table in the end. A cell that fails is a row that says why; the other cells still run. This file does not know
what a cell compares.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.common import environment
from fedloom.common.errors import RunFailed, UserError
from fedloom.common.files import is_unfinished, write_json
from fedloom.common.logs import reworded
from fedloom.experiment.benchmark.columns import Numbers, measured
from fedloom.experiment.benchmark.declaration import Benchmark, Cell, Values
from fedloom.experiment.run import run
from fedloom.federation.checks import check_algorithm
from fedloom.federation.record.events import read_events
from fedloom.federation.record.run_folder import RunFolder
from fedloom.recipe.recipe import Recipe
from fedloom.reporting import differences as settings
from fedloom.reporting.summary_types import Summary, read_summary

log = logging.getLogger(__name__)


#: The metric of a round that the hook `validation_loss` reports.
VALIDATION = "validation_loss/loss"


#: Keys of a benchmark that only change what is shown. They may change between two calls.
SHOWN = ("ratios", "terminal", "judged_by")


#: The file with a pilot's choice, in the folder of its runs.
CHOSEN = "chosen.json"


#: The trouble of a cell that has not started, or whose run was killed.
NOT_RUN = "not run yet"


@dataclass
class Outcome:
    """The results of a cell.

    Attributes:
        chosen: what the pilot chose; empty without a pilot.
        measured: seed → the run's numbers (columns.py).
        trouble: why runs are missing; empty where none is.
    """

    cell: Cell
    chosen: Values = field(default_factory=dict)
    measured: dict[int, Numbers] = field(default_factory=dict)
    trouble: str = ""


def run_benchmark(benchmark: Benchmark, out: Path, *, only: str = "", size: str | None = None) -> list[Outcome]:
    """Run every cell that is not finished; return the outcomes of all, in the order of the axes.

    Args:
        only: run the cells whose name contains this; the others keep the results that they have.

    Raises:
        UserError: a recipe is wrong, or `out` has another benchmark. Nothing was run.
    """
    cells = benchmark.cells()
    check(benchmark)
    _claim(benchmark, out, size)
    order = sorted(range(len(cells)), key=lambda i: (cost(cells[i].recipe(benchmark.seeds[0])), i))
    chosen_first = [cells[i] for i in order if only in cells[i].name]
    if only and not chosen_first:
        raise UserError(f"--only {only}: no cell has this in its name: one is {cells[0].name}")
    for number, cell in enumerate(chosen_first, start=1):
        log.info(f"{cell.name} ({number} of {len(chosen_first)})")
        for line in _run_cell(benchmark, cell, out):
            log.info(f"  {line}")
    return [outcome(benchmark, cell, out) for cell in cells]


def check(benchmark: Benchmark) -> dict[str, str]:
    """Parse every recipe, and check it against its algorithm.

    Returns:
        cell → why its algorithm rejects the recipe. Such a cell becomes a row without a result.

    Raises:
        UserError: a key or value of a recipe or of a pilot's recipe is wrong.
    """
    refused = {}
    for cell in benchmark.cells():
        recipes = [cell.recipe(benchmark.seeds[0], choice) for choice in cell.choices()]
        if len(recipes) > 1:
            recipes += [_pilot(benchmark, cell, choice) for choice in cell.choices()]
        try:
            for recipe in recipes:
                check_algorithm(recipe)
        except UserError as error:
            refused[cell.name] = str(error)
    return refused


def cost(recipe: Recipe) -> float:
    """Estimate how many tokens a run trains on. Cells run in this order."""
    train, federation = recipe.train, recipe.federation
    sampled = federation.clients_per_round
    clients = float(sampled) if sampled and sampled >= 1 else float(recipe.split.num_clients or 8)
    steps = train.steps or 16
    return federation.rounds * steps * train.batch_size * train.accumulation * clients * recipe.data.max_length


def _run_cell(benchmark: Benchmark, cell: Cell, out: Path) -> Iterator[str]:
    """Run the pilot and then each seed; yield one line for each result."""
    trouble = out / "cells" / cell.name / "trouble.json"
    trouble.unlink(missing_ok=True)
    try:
        chosen = _chosen(benchmark, cell, out)
    except (UserError, RunFailed) as error:
        write_json(trouble, {"trouble": str(error)})
        yield f"no result: {error}"
        return
    if chosen:
        yield f"chosen {settings.line(chosen)}"
    troubles = []
    for seed in benchmark.seeds:
        folder = out / "cells" / cell.name / str(seed)
        if read_summary(RunFolder(folder)) is not None:
            continue
        try:
            loss = _finish(cell.recipe(seed, chosen), folder)["loss"]
            yield f"seed {seed}: loss {_number(loss['before'])} to {_number(loss['after'])}"
        except (UserError, RunFailed) as error:
            troubles.append(f"seed {seed}: {error}" if len(benchmark.seeds) > 1 else str(error))
            yield f"no result: {troubles[-1]}"
    if troubles:
        write_json(trouble, {"trouble": "; ".join(troubles)})


def _chosen(benchmark: Benchmark, cell: Cell, out: Path) -> Values:
    """Return what the pilot chooses; run the pilot first if needed. The choice is stored, so later calls reuse it.

    Raises:
        RunFailed: a pilot failed for a reason other than its values, such as too little memory; or no pilot gave a
            finite loss.
    """
    choices, leader = cell.choices(), cell.leader or cell
    if len(choices) > 1 and _stored_choice(leader, out) is None:
        for number, choice in enumerate(choices):
            folder = _pilot_folder(out, leader, number)
            try:
                _finish(_pilot(benchmark, leader, choice), folder)
            except RunFailed:
                if not _diverged(folder):
                    raise
        write_json(out / "pilots" / leader.name / CHOSEN, choose(leader, out))
    return choose(cell, out)


def _diverged(folder: Path) -> bool:
    """Whether a client got numbers that are not finite, as with a learning rate that is far too high."""
    events = read_events(folder / "events.jsonl") if (folder / "events.jsonl").is_file() else []
    return any(e["event"] == "client_failed" and e["reason"] == "non_finite" for e in events)


def _finish(recipe: Recipe, folder: Path) -> Summary:
    """Run or resume the run in `folder` unless it is finished; return its summary."""
    there = read_summary(RunFolder(folder))
    if there is not None:
        return there
    environment.reset_peak_memory()
    with reworded(lambda text: None):  # a benchmark logs its cells only; each run's events are in its folder
        return run(recipe, folder, resume=RunFolder(folder).holds_a_run).summary


def _pilot(benchmark: Benchmark, cell: Cell, choice: Values) -> Recipe:
    """Build a pilot's recipe: a short run with a validation loss after the last round and as little test as possible."""
    recipe = cell.recipe(benchmark.seeds[0], {**cell.pilot_values, **choice})
    quiet = {"evaluation.suite": None, "evaluation.every": 0, "evaluation.answers": 0, "evaluation.clients": 1}
    return recipe.with_values({**quiet, "hooks": [{"name": "validation_loss", "every": recipe.federation.rounds}]})


def _pilot_folder(out: Path, cell: Cell, number: int) -> Path:
    return out / "pilots" / cell.name / str(number)


def choose(cell: Cell, out: Path) -> Values:
    """Return the stored choice, else the choice with the lowest finite validation loss in its pilot.

    Raises:
        RunFailed: no pilot gave a finite loss.
    """
    leader, choices = cell.leader or cell, cell.choices()
    stored = _stored_choice(leader, out)
    if len(choices) == 1 or stored is not None:
        return choices[0] if stored is None else stored
    losses = [_validation_loss(_pilot_folder(out, leader, number)) for number in range(len(choices))]
    best = min(range(len(losses)), key=lambda i: losses[i])
    if not math.isfinite(losses[best]):
        raise RunFailed(f"no value of {', '.join(cell.pilot)} gives a finite validation loss")
    return choices[best]


def _stored_choice(leader: Cell, out: Path) -> Values | None:
    return RunFolder(out / "pilots" / leader.name).read(CHOSEN)


def _validation_loss(folder: Path) -> float:
    events = read_events(folder / "events.jsonl") if (folder / "events.jsonl").is_file() else []
    found = [e["metrics"].get(VALIDATION) for e in events if e["event"] == "round_finished"]
    loss = found[-1] if found else None
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else math.inf


def outcome(benchmark: Benchmark, cell: Cell, out: Path) -> Outcome:
    """Read the results of a cell that exist in `out`."""
    folder = out / "cells" / cell.name
    found = Outcome(cell)
    for seed in benchmark.seeds:
        numbers = measured(folder / str(seed))
        if numbers is not None:
            found.measured[seed] = numbers
    if len(cell.choices()) > 1 and found.measured:
        with contextlib.suppress(RunFailed):  # the pilots were deleted
            found.chosen = choose(cell, out)
    trouble = RunFolder(folder).read("trouble.json")
    if trouble is not None:
        found.trouble = str(trouble["trouble"])
    elif len(found.measured) < len(benchmark.seeds):
        found.trouble = NOT_RUN
    return found


def _claim(benchmark: Benchmark, out: Path, size: str | None) -> None:
    """Write benchmark.json, or compare it with the one in `out`. Raises UserError if they differ."""
    wanted = {"size": size, **benchmark.model_dump(mode="json", exclude={"sizes", *SHOWN})}
    there = RunFolder(out).read("benchmark.json")
    if there is not None and there != wanted:
        differs = sorted(key for key in {*there, *wanted} if there.get(key) != wanted.get(key))
        raise UserError(f"{out} has another benchmark ({', '.join(differs)} differ): name another --out")
    if there is None:
        if out.is_dir() and not all(is_unfinished(path) for path in out.iterdir()):
            raise UserError(f"{out} is not empty and has no benchmark: name another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "benchmark.json", wanted)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
