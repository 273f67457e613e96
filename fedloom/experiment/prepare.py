"""From a recipe to data, algorithm and model, wherever the clients are. What cannot be is refused on the way.

    check_recipe      refuse what the recipe alone rules out
    Source.find       the data, as far as they are known without a model: here a corpus and its split, of sites their names
    settle            what the recipe leaves open and the data decide; then the algorithm, check_data, the schedule
    server_model      the frozen base with one adapter in it
    _probe            what the recipe leaves open and only the model can tell; then check_model
    Source.tokenise   each client's tokens and questions
    Source.join       sites are told the recipe, and report how much data they have

Three recipes pass through here: the one that was given, `settled.recipe` and, with nothing left open, `resolved`. Values
are settled in two places because kernels, packing and cohorts are tried on the model, and the model's own adapter follows
from what the data decide (`adapter.ranks`, `privacy`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fedloom.algorithms.base import Algorithm
from fedloom.algorithms.build import make
from fedloom.algorithms.privacy.plan import describe_privacy, settle_privacy
from fedloom.common import environment, registry
from fedloom.data.corpus import Corpus, Partition
from fedloom.data.federated import FederatedData
from fedloom.data.prompts import Template
from fedloom.evaluation.suites import Suite
from fedloom.federation.checks import check_data, check_model, check_recipe
from fedloom.federation.checks.facts import ModelFacts
from fedloom.federation.cohorts import alone_by_recipe, choose_cohort
from fedloom.federation.hooks.calls import check_hooks
from fedloom.federation.rounds.devices import Fleet, make_fleet, pace_of, with_room
from fedloom.federation.rounds.schedule import Schedule, make_schedule
from fedloom.federation.rounds.virtual_time import Pace
from fedloom.federation.runtime import Runtime
from fedloom.federation.watch import Watch
from fedloom.federation.workplace import Found, find_data, holders, open_models, open_template, tokenise_data
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.recipe.recipe import Recipe, TrainConfig
from fedloom.training.precision import choose_precision
from fedloom.training.probes import choose_packing, settle_attention

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where the clients' data are: in this process (`Here`), or at sites (sites.py)."""

    elsewhere: bool

    def find(self, recipe: Recipe) -> Found:
        """The data, as far as they are known before there is a model. Raises UserError."""
        ...

    def open_models(self, recipe: Recipe) -> Models:
        """The server's base model."""
        ...

    def tokenise(self, recipe: Recipe, found: Found, template: Template) -> FederatedData:
        """What is here of the data, as tokens."""
        ...

    def join(self, setting: Setting) -> Setting:
        """The setting once the clients know the recipe."""
        ...


class Here:
    """The data are in this process: those of a simulation, whose corpus is split among its clients."""

    elsewhere = False

    def find(self, recipe: Recipe) -> Found:
        return find_data(recipe)

    def open_models(self, recipe: Recipe) -> Models:
        return open_models(recipe)

    def tokenise(self, recipe: Recipe, found: Found, template: Template) -> FederatedData:
        return tokenise_data(recipe, found, template)

    def join(self, setting: Setting) -> Setting:
        return setting


@dataclass
class Setting:
    """All that a run needs before its first round.

    Attributes:
        recipe: resolved: every default and choice is written out.
        split: what split.json says.
        runtime: clients who are elsewhere and keep their data; None where this process opens the recipe's runtime.
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
    runtime: Runtime | None = None


@dataclass
class Settled:
    """A recipe whose data are known, and what follows from both.

    Attributes:
        recipe: with all that recipe and data decide written into it.
        fleet: the clients' devices, None for a recipe without.
        notes: sentences for the user.
    """

    recipe: Recipe
    algorithm: Algorithm
    schedule: Schedule
    fleet: Fleet | None
    notes: list[str]


def prepare(recipe: Recipe, watch: Watch, source: Source | None = None, *, models: Models | None = None) -> Setting:
    """From a recipe to data, algorithm and model. Raises UserError for whatever cannot be.

    Args:
        source: where the data are; by default in this process.
        models: a base that is loaded already, of the same recipe but for its algorithm.
    """
    with watch.hearing():
        return _prepared(recipe, source or Here(), models)


def _prepared(recipe: Recipe, source: Source, models: Models | None) -> Setting:
    """`prepare`, with its sentences on their way to whoever hears them."""
    torch.set_num_threads(_threads(recipe))

    check_recipe(recipe)
    found = source.find(recipe)
    settled = settle(recipe, found)
    algorithm = settled.algorithm
    for note in settled.notes:
        log.info(note)

    # A frozen base with one adapter in it, and how it is spoken to.
    models = models or source.open_models(settled.recipe)
    model = algorithm.server_model(models)
    template = open_template(settled.recipe, model.tokenizer)
    for note in registry.notes():
        log.warning(note)

    # What only the model can tell; cohorts are timed on the clients' own tokens.
    attention, train = _probe(settled.recipe, model, source.elsewhere)
    check_model(ModelFacts(settled.recipe, train, model, settled.schedule, settled.fleet, source.elsewhere))
    check_hooks(settled.recipe, algorithm, holders(settled.recipe, found))
    schedule = with_room(settled.recipe, settled.schedule, settled.fleet, model)
    data = source.tokenise(settled.recipe, found, template)
    resolved = settled.recipe.with_values(
        {
            "data.template": template.style,
            "model.attention": attention,
            "train.precision": train.precision,
            "train.packing": train.packing,
            "train.cohort": choose_cohort(settled.recipe, train.packing, model, data, schedule),
        }
    )

    setting = Setting(
        resolved, found.corpus, found.clients, data, models, model, algorithm, template, found.suite, found.score_note,
        schedule, found.split, pace_of(resolved, algorithm, settled.fleet),
    )  # fmt: skip
    return source.join(setting)


def settle(recipe: Recipe, found: Found) -> Settled:
    """Decide what the recipe leaves open, as far as the data tell, and make the algorithm. Raises UserError.

    No model is loaded, so that the server of sites can call this before anything is started.
    """
    values: dict[str, Any] = {
        "runtime.threads": _threads(recipe),
        "evaluation.suite": found.suite.name if found.suite else None,
        **found.values,
    }
    notes: list[str] = []
    if recipe.train.cohort == "auto" and (why := alone_by_recipe(recipe)):
        values["train.cohort"] = "off"
        notes.append(f"every client trains alone: {why}")
    fleet = make_fleet(recipe, found.clients)
    if fleet is not None and recipe.adapter.ranks == "by device":
        values["adapter.ranks"] = fleet.ranks(recipe.adapter.rank)
    values |= settle_privacy(recipe, len(found.clients.training_clients))
    stated = recipe.with_values(values)
    if stated.privacy is not None:
        notes += describe_privacy(stated.privacy)
    algorithm = make(stated)
    check_data(stated, algorithm, found.clients)
    return Settled(stated, algorithm, make_schedule(stated, algorithm, found.clients), fleet, notes)


def _probe(recipe: Recipe, model: AdaptedModel, elsewhere: bool) -> tuple[str, TrainConfig]:
    """Try the model: the kernel of packed batches, and the section `train` with precision and packing chosen.

    Kernel and precision stay open where clients are elsewhere, for each site chooses its own.
    """
    attention: str = recipe.model.attention
    precision: str = recipe.train.precision
    if not elsewhere:
        precision = choose_precision(precision, model.device)
        attention = settle_attention(attention, model, precision)
    packing = choose_packing(recipe.train.packing, model)
    return attention, recipe.train.model_copy(update={"precision": precision, "packing": packing})


def _threads(recipe: Recipe) -> int:
    return recipe.runtime.threads or environment.available_cores()
