"""A federation's server: the run inside the engine's job (`RunJob`), and around it the command that watches over it.

    fedloom serve ── the engine's service ── its job: experiment.run, with sites for clients
        │                                        │ says, events, progress: lines of a file
        └── shows them; begins the job again from the last checkpoint when it was lost, or when a site is back

The server holds no example of anybody. What it knows of a site's data is five numbers. This file does not know how a
site works, nor what certificates are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
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
from fedloom.experiment.run import run
from fedloom.federation.checks import check_recipe
from fedloom.federation.hooks.calls import check_hooks, for_clients
from fedloom.federation.record.run_folder import RunFolder, opened, resumed
from fedloom.federation.rounds.schedule import Schedule, make_schedule
from fedloom.federation.watch import Watch
from fedloom.federation.workplace import Found, open_models
from fedloom.models.attach import Models
from fedloom.models.emulator import shipping
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.ranks.worker import end_with_parent
from fedloom.runtimes.sites.exchange import Patience
from fedloom.runtimes.sites.flare.controller import RunController
from fedloom.runtimes.sites.flare.link import FlareLink
from fedloom.runtimes.sites.order import AGAIN, FEDERATION, Lines, Order, hold
from fedloom.runtimes.sites.project import Project
from fedloom.runtimes.sites.runtime import Distributed, StartAgain
from fedloom.runtimes.sites.supervisor import Server, _Supervisor

log = logging.getLogger(__name__)

#: Seconds that a site has to load model and data, whatever the round's deadline.
LOADING = 600.0


class Sites:
    """The data are at sites (`prepare.Source`): this process knows their clients' names, and later how much they have.

    Args:
        folder: the run's folder.
        resume: the run goes on, so that sites find their state of it again.
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
    """With all sites it could be made: what stands against it now is that some are missing."""
    try:
        return make_schedule(recipe, algorithm, clients)
    except UserError:
        raise RunFailed(
            f"{len(clients.training_clients)} sites take part and a round needs {recipe.federation.min_clients} updates "
            "(federation.min_clients): finished rounds are kept, go on with --resume once the others are there"
        ) from None


def check(recipe: Recipe, clients: Sequence[str]) -> None:
    """Raise UserError for what the server can refuse before it starts anything. `clients`: of the project's sites."""
    check_recipe(recipe)
    settle(recipe, find_at_sites(recipe, clients))


def _shard(counts: Mapping[str, int]) -> Shard:
    """Numbers as places without examples: the site alone knows what stands there."""
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


# ---------------------------------------------------------------------------- inside the engine's job


class RunJob(RunController):
    """The engine's job: one run."""

    def conduct(self, link: FlareLink, sites: list[str]) -> None:
        end_with_parent()
        order = Order.read(Path(os.environ["FEDLOOM_ORDER"]))
        folder = Path(order.folder)
        lines = Lines(folder / "watch.jsonl")
        code, sentence = 1, ""
        try:
            conduct(order, link, sites, lines)
            code = 0
        except StartAgain as error:
            code, sentence = AGAIN, str(error)
        except UserError as error:
            code, sentence = 2, str(error)
        except RunFailed as error:
            sentence = str(error)
        except Exception as error:  # the job's own boundary: the command shows it and ends with 1
            traceback.print_exc()
            sentence = f"{type(error).__name__}: {error}; the traceback is in the server's service.log"
        write_json(folder / "outcome.json", {"code": code, "sentence": sentence})


def conduct(order: Order, link: FlareLink, sites: list[str], lines: Lines) -> None:
    """The run, as `fedloom run` has it, with sites for clients."""
    recipe = Recipe.parse(order.recipe)
    project = Project.model_validate(order.project)
    watch = Watch(lines.say, lines.event, lines.tick)
    with watch.hearing():  # the runtime's own threads hear what this one does
        runtime = Distributed(
            link,
            project.clients,
            sites,
            patience(recipe.federation.round_deadline),
            lambda dead: heard_again(Path(order.folder) / "heard.json", dead),
            Path(order.out) / FEDERATION,
        )
        source = Sites(runtime, Path(order.out), order.resume)
        run(recipe, order.out, resume=order.resume, overwrite=order.overwrite, watch=watch, source=source)


def patience(deadline: float | None) -> Patience:
    """Under a deadline nobody waits much longer behind other work than for the work itself."""
    return Patience() if deadline is None else Patience(deadline=deadline, prepare=max(deadline, LOADING))


def heard_again(path: Path, dead: Mapping[str, float]) -> bool:
    """Whether the engine heard of a lost site after it was lost: its agent runs, but not in this job."""
    try:
        heard = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(float(heard.get(site, 0.0)) > since + 2.0 for site, since in dead.items())


def serve(
    server: Server,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool,
    overwrite: bool,
    watch: Watch,
    wait: float | None,
    during: Callable[[], None] = lambda: None,
) -> None:
    """Run a recipe among the project's sites.

    Args:
        wait: seconds until the run begins without the sites that are missing; None waits for all of them.
        during: called twice a second.

    Raises:
        UserError: the recipe asks for what cannot be.
        RunFailed: the work failed; finished rounds are kept.
    """
    with opened(out, resume=resume, overwrite=overwrite) as run_folder:
        check(resumed(run_folder, recipe) if resume else recipe, tuple(server.project.clients))
    lock = hold(server.kit, "serve")
    (out / FEDERATION).mkdir(parents=True, exist_ok=True)
    exchange = server.kit / "run"
    shutil.rmtree(exchange, ignore_errors=True)
    exchange.mkdir()
    order = Order(
        recipe.resolved(),
        str(out.resolve()),
        resume,
        overwrite,
        server.project.model_dump(mode="json"),
        str(exchange.resolve()),
    )
    supervisor = _Supervisor(server, order, exchange, watch, during, recipe.federation)
    try:
        supervisor.run(wait)
    finally:
        supervisor.close()
        lock.close()
