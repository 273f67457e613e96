"""One of the ranks that train a simulation's clients together. `python -m fedloom.cluster SOCKET RANK COUNT MEETING`.

Told the resolved recipe of a run, each rank loads the same corpus, makes the same split and holds a base model of its own
or its part of one; then it does what the simulator asks (runtimes/ranked.py). A site's ranks are `fedloom.site`'s.
This file does not know the coordinator.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedloom import carriers, registry
from fedloom.checkpoint import ClientStore
from fedloom.choices import federated_data, load_data, pick_suite
from fedloom.client import Client
from fedloom.config import Recipe
from fedloom.data.prompts import Template
from fedloom.data.splitters import partition
from fedloom.errors import UserError
from fedloom.models.adapters import Models
from fedloom.models.loading import load_tokenizer, pick_device
from fedloom.runtimes import wire
from fedloom.runtimes.ranked import LIMIT
from fedloom.runtimes.trainer import Place, end_rank, serve
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
        data = federated_data(recipe, corpus, holders, template, suite, carriers.home() / "tokenised", print)
    store = ClientStore(folder / "clients", recipe.tracking.keep_checkpoints + 1)
    return Client(models_of(recipe, ranks), data, template, store, folder / "adapters", suite, ranks)


class Cluster:
    """What a rank does with one question after another."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._recipe: dict[str, Any] = {}
        self._client: Client | None = None

    def answer(self, kind: str, body: bytes | bytearray) -> tuple[dict[str, Any], bytes]:
        """A frame's header and body. An error that nobody foresaw ends this rank."""
        try:
            if kind == "prepare":
                return self._prepare(json.loads(body))
            assert self._client is not None
            assignment = wire.decode_assignment(body, LIMIT)
            outcome = self._client.handle(replace(assignment, recipe=self._recipe))
            return {"state": "done"}, wire.encode_outcome(outcome) if self._place.first else b""
        except Exception as error:
            end_rank(error)

    def _prepare(self, orders: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        try:
            recipe = Recipe.parse(orders["recipe"])
            runtime = recipe.runtime
            ranks = self._place.joined(runtime.parallel, pick_device(runtime.device))
            self._client = open_clients(recipe, Path(orders["folder"]), ranks)
        except UserError as error:
            return {"state": "failed", "detail": str(error)}, b""
        self._recipe = orders["recipe"]
        return {"state": "done"}, b""


def main(arguments: list[str]) -> None:
    place = Place.of(arguments)
    serve(place, LIMIT, Cluster(place).answer)


if __name__ == "__main__":
    main(sys.argv[1:])
