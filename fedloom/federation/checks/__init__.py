"""Refuse what cannot be: one table of rules (`STAGES`), evaluated at three moments of every run, wherever its clients are.

    check_recipe   before anything is touched; the server of sites calls it before it starts anything
    check_data     once clients and the sizes of their data are known
    check_model    once the model is loaded

Names are looked up first, so an unknown one is refused with its nearest. Then the rules of a stage are tried in the order
of the table, and the first that applies is the sentence. At the end of its stage an algorithm or a hook refuses by its own
`check`. docs/refusals.md is made from this table.
"""

from __future__ import annotations

from typing import Any

from fedloom.algorithms.base import Algorithm
from fedloom.algorithms.build import options_of
from fedloom.common import registry
from fedloom.data.corpus import Partition
from fedloom.federation.checks.algorithm_rules import ALGORITHM_RULES, RANK_RULES
from fedloom.federation.checks.data_rules import DATA_RULES
from fedloom.federation.checks.facts import DataFacts, ModelFacts, RecipeFacts
from fedloom.federation.checks.model_rules import MODEL_RULES, ROOM_RULES
from fedloom.federation.checks.rule import Rule, refuse
from fedloom.federation.checks.run_rules import GPU_RULES, RUN_RULES
from fedloom.federation.record.events import find_trackers
from fedloom.messages.operators.channel import Chains
from fedloom.recipe.recipe import Recipe

#: Stage → its rules, in the order in which they are tried.
STAGES: dict[str, tuple[Rule[Any], ...]] = {
    "recipe": (*ALGORITHM_RULES, *RANK_RULES, *RUN_RULES, *GPU_RULES),
    "data": DATA_RULES,
    "model": (*ROOM_RULES, *MODEL_RULES),
}


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for a recipe that no data and no model could make run."""
    facts = RecipeFacts(recipe)
    look_up(facts)
    check_algorithm(recipe)
    refuse(RUN_RULES, facts)
    if facts.can.pooled_tests:  # a site has GPUs of its own
        refuse(GPU_RULES, facts)


def look_up(facts: RecipeFacts) -> None:
    """Raise UserError for a name that is not registered, or options that do not fit it."""
    recipe = facts.recipe
    find_trackers(recipe.tracking.trackers)
    names = {
        registry.algorithms: recipe.algorithm.name,
        registry.runtimes: recipe.runtime.name,
        registry.corpora: recipe.data.corpus,
        registry.splitters: recipe.split.splitter,
    }
    for table, name in names.items():
        if name is not None:
            table.get(name)
    suite = recipe.evaluation.suite
    if suite not in (None, "auto") and suite not in registry.task_suites:
        registry.suites.get(suite)
    _ = facts.hooks, facts.device
    Chains.of(recipe.operators, recipe.privacy is not None)


def check_algorithm(recipe: Recipe) -> None:
    """Raise UserError for an algorithm that cannot work with this recipe's method, model, privacy or ranks."""
    facts = RecipeFacts(recipe)
    options = options_of(facts.algorithm, recipe)
    refuse(ALGORITHM_RULES, facts)
    refuse(RANK_RULES, facts)
    facts.algorithm.check(options, recipe.adapter, recipe.train, recipe.model)


def check_site(recipe: Recipe) -> None:
    """Raise UserError for ranks that cannot train a client together on this machine. `recipe` is as the site runs it."""
    facts = RecipeFacts(recipe)
    _ = facts.hooks
    refuse(RANK_RULES, facts)
    refuse(GPU_RULES, facts)


def check_data(recipe: Recipe, algorithm: Algorithm, clients: Partition) -> None:
    """Raise UserError where these clients and their data cannot serve the recipe."""
    refuse(DATA_RULES, DataFacts(recipe, algorithm, clients))


def check_model(facts: ModelFacts) -> None:
    """Raise UserError where this model cannot train as the recipe asks, or simulated devices have no room for it."""
    refuse(STAGES["model"], facts)
