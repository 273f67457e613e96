"""Turn a recipe into data, algorithm and model, wherever the clients are. Recipes that cannot run are rejected on the way.

    check_recipe      reject what the recipe alone rules out
    Source.find       the data that are known without a model: a corpus and its split, or the names of sites
    settle            choose open values that depend on the data; then the algorithm, check_data, the schedule
    server_model      the frozen base with one adapter in it
    _probe            choose open values that depend on the model; then check_model
    Source.tokenise   each client's tokens and questions
    Source.join       sites receive the recipe, and report how much data they have

There are three recipes here: the one given, `settled.recipe`, and `resolved`, in which no value is open. Values are
chosen in two steps because kernels, packing and cohorts are probed on the model. The model's adapter depends on values
that the data decide (`adapter.ranks`, `privacy`).
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
from fedloom.data.federated import FederatedData
from fedloom.data.prompts import Template
from fedloom.federation.checks import check_data, check_model, check_recipe
from fedloom.federation.checks.facts import ModelFacts
from fedloom.federation.cohorts import alone_by_recipe, choose_cohort
from fedloom.federation.hooks.calls import check_hooks
from fedloom.federation.rounds.devices import Fleet, make_fleet, with_room
from fedloom.federation.rounds.schedule import Schedule, make_schedule
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
    """Where the clients' data are: in this process (`Here`), or at sites (site_data.py)."""

    elsewhere: bool

    def find(self, recipe: Recipe) -> Found:
        """Find the data that are known before there is a model. Raises UserError."""
        ...

    def open_models(self, recipe: Recipe) -> Models:
        """Open the server's base model."""
        ...

    def tokenise(self, recipe: Recipe, found: Found, template: Template) -> FederatedData:
        """Tokenise the data that are in this process."""
        ...

    def join(self, setting: Setting) -> Setting:
        """Give the clients the recipe; return the setting that results."""
        ...


class Here:
    """The data are in this process: a simulation splits its corpus among its clients."""

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
        found: the data before they are tokens: corpus, split and suite.
        data: the same as tokens.
        runtime: connects clients that are elsewhere and keep their data; None where this process opens the recipe's
            runtime.
    """

    recipe: Recipe
    found: Found
    data: FederatedData
    models: Models
    template: Template
    algorithm: Algorithm
    schedule: Schedule
    runtime: Runtime | None = None

    @property
    def model(self) -> AdaptedModel:
        """The server's model, with one adapter in it."""
        return self.algorithm.model


@dataclass
class Settled:
    """A recipe whose data are known, and what follows from both.

    Attributes:
        recipe: the recipe with every value that the data decide.
        fleet: the clients' devices; None for a recipe without devices.
        notes: sentences for the user.
    """

    recipe: Recipe
    algorithm: Algorithm
    schedule: Schedule
    fleet: Fleet | None
    notes: list[str]


def prepare(recipe: Recipe, watch: Watch, source: Source | None = None, *, models: Models | None = None) -> Setting:
    """Turn a recipe into data, algorithm and model. Raises UserError if the recipe cannot run.

    Args:
        source: where the data are; by default in this process.
        models: a base that is already loaded, from a recipe that differs only in its algorithm.
    """
    with watch.hearing():
        return _prepared(recipe, source or Here(), models)


def _prepared(recipe: Recipe, source: Source, models: Models | None) -> Setting:
    """Do what `prepare` says, after `watch` began to receive log lines."""
    torch.set_num_threads(_threads(recipe))

    check_recipe(recipe)
    found = source.find(recipe)
    settled = settle(recipe, found)
    algorithm = settled.algorithm
    for note in settled.notes:
        log.info(note)

    # The frozen base with one adapter in it, and the template of its prompts.
    models = models or source.open_models(settled.recipe)
    model = algorithm.server_model(models)
    template = open_template(settled.recipe, model.tokenizer)
    for note in registry.notes():
        log.warning(note)

    # Values that depend on the model; cohorts are timed on the clients' own tokens.
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

    return source.join(Setting(resolved, found, data, models, template, algorithm, schedule))


def settle(recipe: Recipe, found: Found) -> Settled:
    """Choose open values that depend on the data, and build the algorithm. Raises UserError.

    This loads no model, so the server of sites can call it before it starts anything.
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
    """Probe the model: choose the kernel of packed batches, and precision and packing of the section `train`.

    Kernel and precision stay open where clients are elsewhere, because each site chooses its own.
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
