"""What the server knows of data at sites, and when (`Sites`, a `prepare.Source`).

    before anything starts       the clients' names: `check` rejects what recipe and names rule out
    once sites are connected     five numbers about each site's data

The server has no examples of any client. This file does not know the engine, nor how a site works.
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

from fedloom.algorithms.base import Algorithm
from fedloom.common import registry
from fedloom.common.errors import RunFailed, UserError
from fedloom.common.files import write_json
from fedloom.data.corpus import SITES, Corpus, Partition, Shard
from fedloom.data.federated import FederatedData
from fedloom.data.prompts import Template
from fedloom.data.splitters import SplitRow, SplitTable
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
    """The data are at sites (`prepare.Source`). This process knows the clients' names, and later how much data they have.

    Args:
        folder: the run's folder.
        resume: the run continues, so sites use their stored state of it.
    """

    elsewhere = True

    def __init__(self, runtime: Distributed, folder: Path, resume: bool) -> None:
        self._runtime = runtime
        self._folder = RunFolder(folder)
        self._resume = resume

    def find(self, recipe: Recipe) -> Found:
        return find_at_sites(recipe, self._runtime.clients)

    def open_models(self, recipe: Recipe) -> Models:
        """Open the server's base. Its kernel only shows whether sequences can be packed; each site chooses its own."""
        plain = recipe.model.model_copy(update={"attention": "sdpa"})
        return open_models(recipe.model_copy(update={"model": plain}))

    def tokenise(self, recipe: Recipe, found: Found, template: Template) -> FederatedData:
        return FederatedData(
            found.corpus, tokenise(found.corpus, template, recipe.data.max_length, None), found.clients, {}
        )

    def join(self, setting: Setting) -> Setting:
        """Give every site the recipe, and learn which sites take part and how much data they have.

        Raises:
            UserError: a hook cannot work with these data.
            RunFailed: too few sites take part.
        """
        recipe, algorithm, everybody = setting.recipe, setting.algorithm, setting.found.clients
        log.info("asking the sites about their data")
        # A client with an emulator has only the parts of the model that the server sends, so it needs the tokenizer too.
        files = shipping.tokenizer_files(setting.model.tokenizer) if algorithm.properties.offsite else {}
        counts = self._runtime.greet(for_clients(recipe), run_id(self._folder, recipe, self._resume), files)
        clients = Partition({c: _shard(counts[c]) for c in everybody.clients if c in counts}, "sites", recipe.seed)
        if not clients.training_clients:
            raise RunFailed("no site with training data takes part: see the sites' own logs")
        if recipe.privacy is not None and clients.training_clients != everybody.training_clients:
            raise RunFailed(
                "a private run needs all its sites, because its privacy guarantee was computed for their number: start it "
                "again once they are all connected"
            )
        schedule = _schedule(recipe, algorithm, clients)
        check_hooks(recipe, algorithm, clients)
        data = FederatedData(setting.data.corpus, setting.data.sequences, clients, {})
        found = replace(setting.found, clients=clients, split=_split(clients))
        return replace(setting, found=found, data=data, schedule=schedule, runtime=self._runtime)


def find_at_sites(recipe: Recipe, clients: Sequence[str]) -> Found:
    """Describe the sites' data before the sites report them: only names are known. Each is assumed to have every part."""
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
    """Build the schedule. It was possible with all sites, so if it is rejected now, sites are missing."""
    try:
        check_data(recipe, algorithm, clients)
        return make_schedule(recipe, algorithm, clients)
    except UserError:
        raise RunFailed(
            f"{len(clients.training_clients)} sites take part and a round needs {recipe.federation.min_clients} updates "
            "(federation.min_clients): finished rounds are kept, continue with --resume once the others are connected"
        ) from None


def check(recipe: Recipe, clients: Sequence[str]) -> None:
    """Raise UserError for what the server can reject before it starts anything. `clients`: those of the project's sites."""
    check_recipe(recipe)
    settle(recipe, find_at_sites(recipe, clients))


def _shard(counts: Mapping[str, int]) -> Shard:
    """Build a shard of indices from counts. Only the site has the examples."""
    return Shard(*(tuple(range(counts[part])) for part in ("train", "validation", "test")))


def _split(clients: Partition) -> SplitTable:
    """Build split.json with sizes only: a site's categories stay at the site."""
    rows: list[SplitRow] = [
        {"client": c, "train": len(s.train), "validation": len(s.validation), "test": len(s.test), "categories": {}}
        for c, s in clients.shards.items()
    ]
    return {"splitter": "sites", "seed": clients.seed, "categories": [], "clients": rows}


def run_id(folder: RunFolder, recipe: Recipe, resume: bool) -> str:
    """Return the id under which sites store their state of this run: created with the run, read again on resume."""
    path = folder / FEDERATION / "run.json"
    if resume and path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])
    made = hashlib.sha256(f"{recipe.to_yaml()}/{time.time_ns()}/{os.getpid()}".encode()).hexdigest()[:32]
    write_json(path, {"run": made})
    return made
