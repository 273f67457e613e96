"""A process in which clients work, opened from a resolved recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from fedloom.common import cache_folder, registry
from fedloom.data.federated import federated_data
from fedloom.data.loading import load_data
from fedloom.data.prompts import Template
from fedloom.data.splitters import partition
from fedloom.evaluation.pick_suite import pick_suite
from fedloom.federation.client import Client
from fedloom.federation.record.checkpoints import ClientStore
from fedloom.models.attach import Models
from fedloom.models.loading import load_tokenizer
from fedloom.recipe.recipe import Recipe
from fedloom.training.parallel import Ranks


def models_of(recipe: Recipe, ranks: Ranks) -> Models:
    """What a rank makes of the base: the whole of it on its device, or its part."""
    finish = None
    if ranks.sharded:
        from fedloom.models.sharding import sharded

        finish = partial(sharded, device=ranks.device, ranks=ranks.count)
    return Models(recipe.model, recipe.adapter, recipe.seed, ranks.device, print, finish)


def open_clients(recipe: Recipe, folder: Path, ranks: Ranks) -> Client:
    """All clients of the run in `folder`, as `experiment.prepare` and `assemble` make them."""
    torch.set_num_threads(recipe.runtime.threads_of_a_rank)
    with ranks.in_turn():
        corpus, _ = load_data(recipe, print)
        clients = partition(corpus, recipe.split, recipe.seed)
        template = Template.choose(load_tokenizer(recipe.model, print), recipe.data.template, recipe.data.system)
        suite, _ = pick_suite(recipe, corpus)
        pooled = registry.algorithms.get(recipe.algorithm.name).properties.pooled
        holders = clients.pooled() if pooled else clients
        data = federated_data(recipe, corpus, holders, template, suite, cache_folder.home() / "tokenised", print)
    store = ClientStore(folder / "clients", recipe.tracking.keep_checkpoints + 1)
    return Client(models_of(recipe, ranks), data, template, store, folder / "adapters", suite, ranks)
