"""A federation's server: the run inside the engine's job (`RunJob`), and the command that supervises it.

    fedloom serve ── the engine's service ── its job: experiment.run, with sites as clients
        │                                        │ log lines, events, progress: lines of a file
        └── shows them; starts the job again from the last checkpoint when it was lost, or when a site is back

site_data.py has what the server knows of the sites' data. This file does not know how a site works, nor what
certificates are.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from fedloom.common.errors import RunFailed, UserError
from fedloom.common.files import write_json
from fedloom.experiment.run import run
from fedloom.experiment.site_data import Sites, check
from fedloom.federation.checks.ignored import ignored
from fedloom.federation.record.run_folder import opened, resumed
from fedloom.federation.watch import Watch
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

#: Seconds that a site always has to load model and data, even under a shorter deadline of a round.
LOADING = 600.0


# ---------------------------------------------------------------------------- inside the engine's job


class RunJob(RunController):
    """The engine's job, which does one run."""

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
        except Exception as error:  # the job's boundary: the command shows the error and exits with 1
            traceback.print_exc()
            sentence = f"{type(error).__name__}: {error}; the traceback is in the server's service.log"
        write_json(folder / "outcome.json", {"code": code, "sentence": sentence})


def conduct(order: Order, link: FlareLink, sites: list[str], lines: Lines) -> None:
    """Do the run as `fedloom run` does, with sites as clients."""
    recipe = Recipe.parse(order.recipe)
    project = Project.model_validate(order.project)
    watch = Watch(lines.say, lines.event, lines.tick)
    with watch.hearing():  # threads of the runtime send their log lines to the same watch
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
    """Return how long to wait for sites. Under a deadline, waiting behind other work is limited too."""
    return Patience() if deadline is None else Patience(deadline=deadline, prepare=max(deadline, LOADING))


def heard_again(path: Path, dead: Mapping[str, float]) -> bool:
    """Whether the engine heard from a lost site after the loss: the site runs, but this job cannot reach it."""
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
    dealt: bool = False,
) -> None:
    """Run a recipe among the project's sites.

    Args:
        wait: seconds until the run begins without the missing sites; None waits for all of them.
        during: called four times a second.
        dealt: the sites' data are parts of the recipe's corpus.

    Raises:
        UserError: the recipe cannot run.
        RunFailed: the run failed; finished rounds are kept.
    """
    with opened(out, resume=resume, overwrite=overwrite) as run_folder:
        check(resumed(run_folder, recipe) if resume else recipe, tuple(server.project.clients))
    for sentence in ignored(recipe, dealt=dealt):
        log.warning(sentence)
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
