"""Where the data are at sites: what their server knows of them, and when (`Sites`, a `prepare.Source`).

    before anything starts   the clients' names: `check` refuses what recipe and names rule out
    once sites are there     five numbers of each site's data

The server has no example of anybody. This file does not know the engine, nor how a site works.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.algorithms.base import Algorithm
from fedloom.common import registry
from fedloom.common.errors import RunFailed, UserError
from fedloom.common.files import write_json
from fedloom.data.corpus import SITES, Corpus, Partition, Shard
from fedloom.data.federated import FederatedData
from fedloom.data.prompts import Template
from fedloom.data.tokenization import tokenise
from fedloom.evaluation.pick_suite import pick_suite
from fedloom.experiment.prepare import Setting, settle
from fedloom.federation.checks import check_data, check_recipe
from fedloom.federation.hooks.calls import check_hooks, for_clients
from fedloom.federation.record.run_folder import RunFolder
from fedloom.federation.rounds.schedule import Schedule, make_schedule
from fedloom.federation.workplace import Found, open_models
from fedloom.models.attach import Models
from fedloom.models.emulator import shipping
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.sites.order import FEDERATION
from fedloom.runtimes.sites.runtime import Distributed

log = logging.getLogger(__name__)


class Sites:
    """The data are at sites (`prepare.Source`): this process knows their clients' names, and later how much they have.

    Args:
        folder: the run's folder.
        resume: the run continues, so that sites find their state of it again.
    """

    elsewhere = True

    def __init__(self, runtime: Distributed, folder: Path, resume: bool) -> None:
        self._runtime = runtime
        self._folder = RunFolder(folder)
        self._resume = resume

    def find(self, recipe: Recipe) -> Found:
        return find_at_sites(recipe, self._runtime.clients)

    def open_models(self, recipe: Recipe) -> Models:
        """Each site chooses its kernel; here the model only tells whether it keeps sequences apart."""
        plain = recipe.model.model_copy(update={"attention": "sdpa"})
        return open_models(recipe.model_copy(update={"model": plain}))

    def tokenise(self, recipe: Recipe, found: Found, template: Template) -> FederatedData:
        return FederatedData(
            found.corpus, tokenise(found.corpus, template, recipe.data.max_length, None), found.clients, {}
        )

    def join(self, setting: Setting) -> Setting:
        """Give every site the recipe; who takes part, and with how much data, is known afterwards.

        Raises UserError where a hook or the schedule cannot work with these data, and RunFailed where too few sites are
        there.
        """
        recipe, algorithm, everybody = setting.recipe, setting.algorithm, setting.clients
        log.info("asking the sites about their data")
        # Who holds an emulator has nothing of the model but what comes from here, its tokenizer too.
        files = shipping.tokenizer_files(setting.model.tokenizer) if algorithm.properties.offsite else {}
        counts = self._runtime.greet(for_clients(recipe), run_id(self._folder, recipe, self._resume), files)
        clients = Partition({c: _shard(counts[c]) for c in everybody.clients if c in counts}, "sites", recipe.seed)
        if not clients.training_clients:
            raise RunFailed("no site with training data takes part: see the sites' own logs")
        if recipe.privacy is not None and clients.training_clients != everybody.training_clients:
            raise RunFailed(
                "a private run begins with all its sites, since what it promises was computed for their number: start it "
                "again once they are there"
            )
        schedule = _schedule(recipe, algorithm, clients)
        check_hooks(recipe, algorithm, clients)
        data = FederatedData(setting.data.corpus, setting.data.sequences, clients, {})
        return replace(
            setting, clients=clients, data=data, schedule=schedule, split=_split(clients), runtime=self._runtime
        )


def find_at_sites(recipe: Recipe, clients: Sequence[str]) -> Found:
    """What is known of sites' data before they are asked: whose they are. Each is taken to have some of every kind."""
    everybody = Partition({c: Shard((0,), (0,), (0,)) for c in clients}, "sites", recipe.seed)
    named = registry.corpora.get(recipe.data.corpus).suite if recipe.data.corpus else None
    corpus = Corpus(recipe.data.corpus or "the sites' own", (), recipe.data.license or "the sites'", SITES, named)
    suite, note = pick_suite(
        recipe, corpus, "the sites' data has no paired evaluation; name a suite in evaluation.suite if one fits"
    )
    return Found(
        corpus, everybody, suite, note, _split(everybody), {"evaluation.answers": 0}
    )  # texts stay where they are


def _schedule(recipe: Recipe, algorithm: Algorithm, clients: Partition) -> Schedule:
    """Make the schedule. With all sites there it was possible, so a refusal now means that some are missing."""
    try:
        check_data(recipe, algorithm, clients)
        return make_schedule(recipe, algorithm, clients)
    except UserError:
        raise RunFailed(
            f"{len(clients.training_clients)} sites take part and a round needs {recipe.federation.min_clients} updates "
            "(federation.min_clients): finished rounds are kept, continue with --resume once the others are there"
        ) from None


def check(recipe: Recipe, clients: Sequence[str]) -> None:
    """Raise UserError for what the server can refuse before it starts anything. `clients`: of the project's sites."""
    check_recipe(recipe)
    settle(recipe, find_at_sites(recipe, clients))


def _shard(counts: Mapping[str, int]) -> Shard:
    """Turn numbers into places without examples: only the site has those."""
    return Shard(*(tuple(range(counts[part])) for part in ("train", "validation", "test")))


def _split(clients: Partition) -> dict[str, Any]:
    """split.json: sizes; a site's categories stay with it."""
    rows = [
        {"client": c, "train": len(s.train), "validation": len(s.validation), "test": len(s.test), "categories": {}}
        for c, s in clients.shards.items()
    ]
    return {"splitter": "sites", "seed": clients.seed, "categories": [], "clients": rows}


def run_id(folder: RunFolder, recipe: Recipe, resume: bool) -> str:
    """What sites keep their state of this run under: made when the run begins, found again when it is resumed."""
    path = folder / FEDERATION / "run.json"
    if resume and path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])
    made = hashlib.sha256(f"{recipe.to_yaml()}/{time.time_ns()}/{os.getpid()}".encode()).hexdigest()[:32]
    write_json(path, {"run": made})
    return made
