"""From a recipe to data, model and algorithm; whatever cannot be is refused here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fedloom.algorithms.base import Algorithm
from fedloom.algorithms.privacy.plan import settle_privacy
from fedloom.common import cache_folder, environment, registry
from fedloom.data.corpus import Corpus, Partition
from fedloom.data.federated import FederatedData, federated_data
from fedloom.data.loading import load_data
from fedloom.data.prompts import Template
from fedloom.data.splitters import partition, split_table
from fedloom.evaluation.pick_suite import pick_suite
from fedloom.evaluation.suites import Suite
from fedloom.federation.checks import check_ranks, check_runtime, make_algorithm
from fedloom.federation.cohorts import check_cohort, choose_cohort
from fedloom.federation.hooks.calls import Hooks, check_hooks
from fedloom.federation.record.events import find_trackers
from fedloom.federation.record.run_folder import RunFolder
from fedloom.federation.rounds.devices import pace_of, settle_fleet, with_room
from fedloom.federation.rounds.schedule import Schedule, make_schedule
from fedloom.federation.rounds.virtual_time import Pace
from fedloom.federation.runtime import Runtime
from fedloom.federation.watch import Watch
from fedloom.messages.operators.channel import Chains
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.loading import pick_device
from fedloom.recipe.recipe import Recipe
from fedloom.training.precision import choose_precision
from fedloom.training.probes import check_positions, check_sparing, choose_packing, settle_attention


class Remote(Protocol):
    """Clients outside this process, who hold data that this process never sees."""

    @property
    def runtime(self) -> Runtime: ...

    def prepare(self, recipe: Recipe, watch: Watch, folder: RunFolder) -> Setting:
        """What `prepare` gives, from what the clients say of their data."""
        ...


@dataclass
class Setting:
    """All that a run needs before its first round.

    `recipe` has every default and choice written out; `split` is for split.json; data `elsewhere` are not measured here.
    """

    recipe: Recipe
    corpus: Corpus
    clients: Partition
    data: FederatedData
    models: Models
    model: AdaptedModel
    algorithm: Algorithm
    template: Template
    suite: Suite | None
    score_note: str
    schedule: Schedule
    split: dict[str, Any]
    pace: Pace | None = None
    elsewhere: bool = False


def prepare(recipe: Recipe, watch: Watch, models: Models | None = None) -> Setting:
    """From a recipe to data, model and algorithm. Raises UserError for whatever cannot be.

    Args:
        models: a base that is loaded already, of the same recipe but for its algorithm.
    """
    threads = recipe.runtime.threads or environment.available_cores()
    torch.set_num_threads(threads)
    find_trackers(recipe.tracking.trackers)
    algorithm = make_algorithm(recipe)
    check_runtime(recipe, algorithm)
    Chains.of(recipe.operators, recipe.privacy is not None)
    Hooks.of_server(recipe.hooks)
    recipe = check_cohort(recipe, algorithm, watch.say)

    # A corpus, split among clients.
    corpus, recipe = load_data(recipe, watch.say)
    clients = partition(corpus, recipe.split, recipe.seed)
    fleet, recipe, algorithm = settle_fleet(recipe, algorithm, clients)
    check_ranks(recipe, clients)
    schedule = make_schedule(recipe, algorithm, clients)
    recipe, algorithm = settle_privacy(recipe, algorithm, schedule, watch.say)

    # A frozen base with one adapter in it, and how it is spoken to.
    if models is None:
        models = Models(recipe.model, recipe.adapter, recipe.seed, pick_device(recipe.runtime.device), watch.say)
    model = algorithm.server_model(models)
    schedule = with_room(recipe, schedule, fleet, model, watch.say)
    check_positions(recipe, model)
    template = Template.choose(model.tokenizer, recipe.data.template, recipe.data.system)
    recipe = recipe.with_values(
        {
            "runtime.threads": threads,
            "data.template": template.style,
            "train.precision": (precision := choose_precision(recipe.train.precision, model.device, watch.say)),
            "model.attention": settle_attention(recipe.model.attention, model, precision, watch.say),
            "train.packing": choose_packing(recipe.train.packing, model, watch.say),
        }
    )
    check_sparing(recipe, model)

    # What each client holds of it, as tokens; what is scored, and by whom.
    suite, score_note = pick_suite(recipe, corpus)
    for note in registry.notes():
        watch.say(note)
    recipe = recipe.with_values({"evaluation.suite": suite.name if suite else None})
    holders = clients.pooled() if algorithm.properties.pooled else clients
    check_hooks(recipe, algorithm, holders)
    data = federated_data(recipe, corpus, holders, template, suite, cache_folder.home() / "tokenised", watch.say)
    recipe = choose_cohort(recipe, model, data, schedule, watch.say)
    return Setting(
        recipe, corpus, clients, data, models, model, algorithm, template, suite, score_note, schedule,
        split_table(corpus, clients), pace_of(recipe, algorithm, fleet),
    )  # fmt: skip
