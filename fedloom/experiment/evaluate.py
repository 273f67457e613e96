"""`fedloom evaluate`: evaluate a run's result, an adapter's folder or a plain model.

It uses a recipe's held-out data, or a suite of lm-eval tasks on public benchmarks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from fedloom.common import environment, registry
from fedloom.common.errors import UserError, suggest
from fedloom.data.federated import ClientData
from fedloom.data.prompts import Template
from fedloom.evaluation.loss import loss_sums
from fedloom.evaluation.means import PreferenceMeans, Sums, add_sums, means, preference_means
from fedloom.evaluation.score import score
from fedloom.evaluation.suites import Suite
from fedloom.federation.record.run_folder import RunFolder
from fedloom.federation.workplace import find_data, open_models, open_template, tokenise_data
from fedloom.models.adapters import AdaptedModel
from fedloom.models.forward import supports_packing
from fedloom.models.loading import pick_device
from fedloom.models.saved import load_adapted
from fedloom.recipe.recipe import AdapterConfig, Recipe
from fedloom.reporting.export import result_folder
from fedloom.training.objectives import OBJECTIVES

if TYPE_CHECKING:
    from fedloom.evaluation.public.harness import TaskScores

log = logging.getLogger(__name__)


class ClientEvaluation(TypedDict):
    """Mean loss of a token and share of right answers; None where there was nothing to measure."""

    loss: float | None
    score: float | None
    questions: int


class ModelEvaluation(ClientEvaluation):
    """What `evaluate` returns: over all clients together, and for each. `note` says why there is no score."""

    target: str
    preference: PreferenceMeans | None
    suite: str | None
    note: str
    clients: dict[str, ClientEvaluation]


class SuiteEvaluation(TypedDict):
    """What `evaluate_suite` returns.

    `score`, `complete`, `left_out` and `tasks` are as in `harness.SuiteScores`; `command` has lm-eval's own command lines
    for the same.
    """

    target: str
    suite: str
    note: str
    template: str
    limit: int | None
    command: list[list[str]]
    score: float
    complete: bool
    left_out: dict[str, str]
    tasks: Mapping[str, TaskScores]


def evaluate(
    target: str,
    recipe: str | None,
    values: Mapping[str, Any],
    client: str | None,
) -> ModelEvaluation:
    """Compute held-out loss and score, for all clients together and for each client.

    Args:
        target: a run's folder, a folder with an adapter in peft's format, or a model's name or folder.
        recipe: the recipe with corpus, split and evaluation; by default the run's own, or else `quickstart`.
        values: dotted recipe keys to change. Set `model.…` here for a plain model, or to give an adapter another base
            than its configuration names. The recipe's own `model.…` applies only to that recipe's model.
        client: the client whose result to evaluate, after a personal algorithm.
    """
    chosen, model = _loaded(target, recipe, values, client)
    found = find_data(chosen)
    template = open_template(chosen, model.tokenizer)
    data = tokenise_data(chosen, found, template)
    measured = _measure(chosen, model, template, found.suite)
    log.info(f"measuring {target} on {found.corpus.name}, {len(data.measured)} clients")
    sums = {name: measured(data.client(name)) for name in data.measured}
    everything = list(sums.values())
    if data.server_questions:
        everything.append(measured(ClientData(data.sequences, (), (), (), data.server_questions)))
    return {
        "target": target,
        **_means(add_sums(everything)),
        "preference": preference_means(sums),
        "suite": found.suite.name if found.suite else None,
        "note": found.score_note,
        "clients": {name: _means(s) for name, s in sums.items()},
    }


def _measure(
    recipe: Recipe, model: AdaptedModel, template: Template, suite: Suite | None
) -> Callable[[ClientData], Sums]:
    """Return a function of one client's data that gives sums of losses, right answers and preferences."""
    size, packed = recipe.evaluation.batch_size, supports_packing(model)
    objective = OBJECTIVES[recipe.train.objective](recipe.train)
    if recipe.train.objective == "dpo" and (model.full or recipe.adapter.trains_base):
        log.warning("no preferences: this result changed weights of the base, so there is no base to compare with")
        objective = OBJECTIVES["sft"](recipe.train)

    def measured(part: ClientData) -> Sums:
        loss, tokens = loss_sums(model, part.sequences, part.test, batch_size=size, packed=packed)
        right = (
            score(
                model,
                template,
                suite,
                part.questions,
                batch_size=size,
                max_length=recipe.data.max_length,
                max_new_tokens=recipe.evaluation.max_new_tokens,
                packed=packed,
            )
            if suite and part.questions
            else []
        )
        preferred = objective.sums(model, part.sequences, part.test, batch_size=size, packed=packed)
        return Sums(loss, tokens, sum(right), len(right), **preferred)

    return measured


def measured_by_tasks(suite: str | None) -> bool:
    """Whether a suite's name means lm-eval tasks (`evaluate_suite`) and not a recipe's evaluation. Raises UserError."""
    if suite is None or suite in registry.suites or suite == "auto":
        return False
    if suite not in registry.task_suites:
        names = {*registry.suites.names(), *registry.task_suites.names()}
        raise UserError(f"unknown suite {suite!r}: {suggest(suite, names)}")
    return True


def evaluate_suite(
    target: str,
    suite: str,
    recipe: str | None,
    values: Mapping[str, Any],
    client: str | None,
    *,
    limit: int | None = None,
    shots: int | None = None,
    allow_unsafe: bool = False,
) -> SuiteEvaluation:
    """Score public benchmarks with lm-eval and the live model. Prompts follow the recipe's template.

    Args:
        target, recipe, values, client: as in `evaluate`; only the recipe's template, batch size and device matter.
        limit: use only the first so many questions of each task.
        shots: number of answered examples in front of each question; by default the suite's own number.
        allow_unsafe: run programs as the user if no sandbox works.
    """
    chosen_suite = registry.task_suites.get(suite)
    from fedloom.evaluation.public import harness

    chosen, model = _loaded(target, recipe, values, client)
    template = open_template(chosen, model.tokenizer)
    batch_size = chosen.evaluation.batch_size
    measured = harness.score(
        model,
        chosen_suite,
        template,
        batch_size=batch_size,
        limit=limit,
        shots=shots,
        allow_unsafe=allow_unsafe,
    )
    return {
        "target": target,
        "suite": suite,
        "note": chosen_suite.note,
        "template": template.style,
        "limit": limit,
        "command": harness.command("MODEL_FOLDER", chosen_suite, template, batch_size, limit, shots),
        **measured,
    }


def _loaded(
    target: str, recipe: str | None, values: Mapping[str, Any], client: str | None
) -> tuple[Recipe, AdaptedModel]:
    """Load the recipe of the evaluation, and the model."""
    run = RunFolder(Path(target))
    if run.holds_a_run:
        chosen = (Recipe.load(recipe) if recipe else run.stored_recipe()).with_values(values)
    else:
        chosen = Recipe.load(recipe or "quickstart").with_values(values)
    torch.set_num_threads(chosen.runtime.threads or environment.available_cores())
    device = pick_device(chosen.runtime.device)
    if run.holds_a_run:
        return chosen, load_adapted(run.stored_recipe().model, result_folder(run.path, client), device)
    named = {key: value for key, value in values.items() if key == "model" or key.startswith("model.")}
    adapter = Path(target) / "adapter_config.json"
    if adapter.is_file():
        base = Recipe.parse({"model": {"name": _base_of(adapter) or chosen.model.name}}, named).model
        log.info(f"loading {base.name}, the base of {target}")
        return chosen, load_adapted(base, Path(target), device)
    # A new LoRA changes no output, so the same code evaluates a plain model.
    lora = chosen.adapter if chosen.adapter.method == "lora" else AdapterConfig()
    plain = Recipe.parse({}, {**named, "model.name": target}).model
    return chosen, open_models(chosen.model_copy(update={"model": plain, "adapter": lora})).adapted()


def _base_of(adapter: Path) -> str | None:
    """Read the base model's name in an adapter's configuration. Raises UserError if it cannot be read."""
    try:
        name = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{adapter} cannot be read ({error}): name a folder as `fedloom run` and peft write it"
        ) from None
    return str(name) if name else None


def _means(sums: Sums) -> ClientEvaluation:
    found = means(sums)
    return {"loss": found["loss"], "score": found["score"], "questions": found["questions"]}
