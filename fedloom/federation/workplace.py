"""A process in which clients work, opened from a recipe: its data, its base model and the `Client` that plays them all.

Every such process is opened by the functions below, in this order:

    find_data → open_models → open_template → tokenise_data → open_client

    the simulator     experiment/prepare.py, which settles and checks between these steps, and experiment/assemble.py
    a rank            runtimes/ranks/main.py, by `open_simulated_client`
    a Ray actor       runtimes/ray_host.py; its data comes with its orders
    a site            runtimes/sites/trainer.py; its data is its own
    fedloom evaluate  experiment/evaluate.py; it needs no client
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedloom.common import cache_folder, registry
from fedloom.data.corpus import Corpus, Partition
from fedloom.data.federated import FederatedData, federated_data
from fedloom.data.loading import load_data
from fedloom.data.prompts import Template
from fedloom.data.splitters import SplitTable, partition, tabulate_split
from fedloom.evaluation.pick_suite import pick_suite
from fedloom.evaluation.suites import Suite
from fedloom.federation.client import Client
from fedloom.federation.record.checkpoints import ClientStore, Store
from fedloom.models.attach import Models
from fedloom.models.loading import load_tokenizer, pick_device
from fedloom.recipe.recipe import Recipe
from fedloom.training.parallel import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Found:
    """The data of a run, as far as they are known before there is a model.

    Attributes:
        clients: who has which examples.
        suite: the paired evaluation, or None.
        score_note: why there is no score; empty where there is one.
        split: what split.json says.
        values: dotted recipe keys that the data decide, such as ``split.num_clients``.
    """

    corpus: Corpus
    clients: Partition
    suite: Suite | None
    score_note: str
    split: SplitTable
    values: dict[str, Any] = field(default_factory=dict)


def find_data(recipe: Recipe) -> Found:
    """Load the recipe's corpus and split it among clients. Raises UserError."""
    corpus, split = load_data(recipe)
    clients = partition(corpus, split, recipe.seed)
    suite, note = pick_suite(recipe, corpus)
    values = {f"split.{key}": value for key, value in split.model_dump(mode="json").items()}
    return Found(corpus, clients, suite, note, tabulate_split(corpus, clients), values)


def tokenise_data(recipe: Recipe, found: Found, template: Template) -> FederatedData:
    """Turn every client's examples into tokens. Under a pooled baseline one client has them all. Raises UserError."""
    cache = cache_folder.cache_home() / "tokenised"
    return federated_data(recipe, found.corpus, holders(recipe, found), template, found.suite, cache)


def holders(recipe: Recipe, found: Found) -> Partition:
    """The clients with the data that they train on: under a pooled baseline one client has everybody's."""
    pooled = registry.algorithms.get(recipe.algorithm.name).properties.pooled
    return found.clients.pooled() if pooled else found.clients


def open_models(recipe: Recipe, ranks: Ranks | None = None) -> Models:
    """The base model of this process, to be loaded on first use.

    Args:
        ranks: this process's place among ranks, which says the device; with a sharded base it is given its part.
    """
    if ranks is None:
        return Models(recipe.model, recipe.adapter, recipe.seed, pick_device(recipe.runtime.device))
    finish = None
    if ranks.sharded:
        from fedloom.models.sharding import shard_base

        finish = partial(shard_base, device=ranks.device, ranks=ranks.count)
    return Models(recipe.model, recipe.adapter, recipe.seed, ranks.device, finish)


def open_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Template:
    """How prompts are written. Raises UserError where the tokenizer has no chat template and one is wanted."""
    return Template.choose(tokenizer, recipe.data.template, recipe.data.system)


def open_client(
    recipe: Recipe,
    models: Models,
    data: FederatedData,
    template: Template,
    store: Store,
    results: Path,
    ranks: Ranks = ALONE,
    cache: Path | None = None,
) -> Client:
    """The client of this process. `recipe` is resolved, so that it names its suite; the rest is as in `Client`."""
    suite = registry.suites.get(recipe.evaluation.suite) if recipe.evaluation.suite else None
    return Client(models, data, template, store, results, suite, ranks, cache)


def open_store(recipe: Recipe, folder: Path) -> ClientStore:
    """Where clients' own state of the run in `folder` is kept: a version for each kept checkpoint, and the newest."""
    return ClientStore(folder / "clients", recipe.tracking.keep_checkpoints + 1)


def open_simulated_client(recipe: Recipe, folder: Path, ranks: Ranks) -> Client:
    """All clients of the run in `folder`, in a process of their own. `recipe` is resolved. Raises UserError."""
    torch.set_num_threads(recipe.runtime.threads_of_a_rank)
    with ranks.in_turn():
        found = find_data(recipe)
        template = open_template(recipe, load_tokenizer(recipe.model))
        data = tokenise_data(recipe, found, template)
    models = open_models(recipe, ranks)
    return open_client(recipe, models, data, template, open_store(recipe, folder), folder / "adapters", ranks)
