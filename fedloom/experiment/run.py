"""READ THIS FIRST: one run, from a recipe to a report, in the order in which data flows.

    recipe → corpus → partition → model → algorithm → runtime → rounds and evaluation → adapter, summary, report

`prepare` loads data and model, and rejects a recipe that cannot run before anything is written. `assemble` connects the
coordinator to its clients. `run` calls both and saves the results. This file has no arithmetic and no loop over rounds.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from fedloom.common import registry
from fedloom.common.errors import RunFailed, describe_disk_error
from fedloom.common.logs import reworded
from fedloom.evaluation.samples import AnswerRecorder, Answers, pick_samples
from fedloom.experiment.assemble import assemble
from fedloom.experiment.prepare import Setting, Source, prepare
from fedloom.federation.coordinator import Coordinator
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.run_folder import RunFolder, opened, resumed
from fedloom.federation.results import result_loader, save_result
from fedloom.federation.watch import Watch
from fedloom.models.forward import default_peft_model
from fedloom.recipe.recipe import Recipe
from fedloom.reporting.card import write_cards
from fedloom.reporting.html import write_report
from fedloom.reporting.summary import Measured, Product, cost, summarise
from fedloom.reporting.summary_types import Summary

log = logging.getLogger(__name__)


@dataclass
class Result:
    """A finished run.

    Attributes:
        summary: the content of summary.json.
        folder: the run's folder.
        report: the run's report.html.
        model: peft's model with the result in it, ready for `model.generate(...)`. After a personal algorithm, the model
            that all clients started from.
        tokenizer: the model's tokenizer.
    """

    summary: Summary
    folder: Path
    report: Path
    model: Any
    tokenizer: Any


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
    source: Source | None = None,
) -> Result:
    """Run a recipe to its end.

    Args:
        out: the run's folder; `runs/<name>` if None.
        resume: resume from the newest valid checkpoint in `out`. The recipe stored there is used. Only values that may
            change are taken from `recipe` (run_folder.continued), such as more rounds.
        overwrite: replace the run in `out`.
        source: clients that are already elsewhere, with their data (site_data.py); by default the recipe's runtime says
            where they run.

    Raises:
        UserError: the recipe cannot run. Nothing was written or deleted.
        RunFailed: the run failed. Finished rounds are kept, and `resume` continues after them.
    """
    path = Path(out) if out is not None else Path("runs") / (recipe.name or "run")
    watch = watch or Watch()
    with watch.hearing():
        return _conducted(recipe, path, resume, overwrite, watch, source)


def _conducted(
    recipe: Recipe, path: Path, resume: bool, overwrite: bool, watch: Watch, source: Source | None
) -> Result:
    """Do what `run` says, after `watch` began to receive log lines."""
    if source is None and (runtime := registry.runtimes.get(recipe.runtime.name)).capabilities.conducts:
        conducted: Result = runtime.conduct(recipe, path, resume, overwrite, watch)
        return conducted
    try:
        with opened(path, resume=resume, overwrite=overwrite) as folder:
            setting = prepare(resumed(folder, recipe) if resume else recipe, watch, source)
            if overwrite:
                folder.clear()  # nothing is rejected after this line
            return _run(setting, folder, resume, watch)
    except (OSError, SafetensorError) as error:
        trouble = describe_disk_error(error, path)
        if trouble is None:
            raise
        finished = Checkpoints(path / "checkpoints").rounds() if path.is_dir() else []
        kept = f"{finished[0]} finished rounds are kept in {path}" if finished else "no round was finished"
        raise RunFailed(f"{trouble}: {kept}; make room or name another --out, then --resume") from error


def _run(setting: Setting, folder: RunFolder, resume: bool, watch: Watch) -> Result:
    """Run the rounds, then save the results."""
    coordinator = assemble(setting, folder, resume, watch)
    gc.freeze()  # libraries, data and model live as long as the run: scanning them again and again frees nothing
    try:
        return _results(setting, folder, coordinator, watch)
    finally:
        gc.unfreeze()
        coordinator.close()  # ends the clients' processes too


def _results(setting: Setting, folder: RunFolder, coordinator: Coordinator, watch: Watch) -> Result:
    recipe, model, algorithm = setting.recipe, setting.model, setting.algorithm
    settings = recipe.evaluation
    recorder = AnswerRecorder(
        setting.template, setting.found.suite, settings.batch_size, recipe.data.max_length, settings.max_new_tokens
    )  # fmt: skip
    samples = pick_samples(setting.data, settings.answers)
    answers = cast(Answers | None, folder.read("answers.json"))
    if answers is None:
        if samples:
            log.info(f"asking {len(samples)} test questions before training")
        answers = recorder.record_before(samples, model)  # the adapter still has its initial values
        folder.write("answers.json", answers)

    progress = coordinator.run()

    digest = save_result(algorithm, model, recipe.model.name, folder, coordinator)
    if samples:
        log.info("asking the same questions after training")
    load = result_loader(algorithm, model, folder)
    folder.write("answers.json", recorder.record_after(answers, samples, model, load))
    coordinator.close()
    spent = cost(progress)
    reference = None if setting.runtime else _reference(setting, folder, watch)
    load("")
    suite = setting.found.suite.name if setting.found.suite else None
    measured = Measured(progress, coordinator.evaluator.table, suite, setting.found.score_note, spent)
    adapter, privacy = algorithm.deployed().adapter, algorithm.guarantee()
    product = Product(adapter, digest, privacy, algorithm.left_server(), reference)
    summary = summarise(recipe, setting.data, setting.found.clients, measured, product)
    folder.write("summary.json", summary)
    write_cards(folder, recipe, summary, setting.found.clients.clients)
    seconds = summary["cost"]["wall_seconds"]
    coordinator.events.write("run_finished", rounds=progress.finished, adapter_sha256=digest, seconds=seconds)
    coordinator.events.close()
    return Result(summary, folder.path, write_report(folder.path), default_peft_model(model), model.tokenizer)


def _reference(setting: Setting, folder: RunFolder, watch: Watch) -> Summary | None:
    """Run the reference that the algorithm is compared with, in `reference/`; return its summary. None: no reference.

    The reference uses the base model that is already loaded. It is resumed if it was killed, or has more rounds now.
    """
    section = setting.algorithm.compared_with()
    if section is None:
        return None
    recipe = setting.recipe.with_values(
        {
            "name": f"{setting.recipe.name}-reference",
            "description": f"what {setting.recipe.name} is compared with: the same federation on the full model",
            "algorithm": dict(section),
            "evaluation.every": 0,
            "evaluation.answers": 0,
            "tracking.trackers": [],
        }
    )
    path = folder / "reference"
    resume = RunFolder(path).holds_a_run
    log.info("tuning the same layers of the full model, to compare with (algorithm.reference=false leaves this out)")
    quiet = Watch(tick=watch.tick)
    with reworded(lambda text: f"reference: {text}"), opened(path, resume=resume, overwrite=False) as inner:
        wanted = resumed(inner, recipe) if resume else recipe
        return _run(prepare(wanted, quiet, models=setting.models), inner, resume, quiet).summary
