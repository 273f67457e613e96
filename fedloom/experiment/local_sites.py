"""Run a whole federation on one machine: certificates, a server and every site as processes, on loopback.

For demonstrations and tests. It calls the same functions as the commands that organisations use. The corpus is split as
in the simulator, and each site gets its part as a file. This file adds nothing to the server or to a site.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedloom.common.errors import UserError
from fedloom.data.shard_file import write_shard
from fedloom.data.splitters import select_questions
from fedloom.experiment.prepare import settle
from fedloom.experiment.run import Result
from fedloom.experiment.sites import serve
from fedloom.federation.checks import check_recipe
from fedloom.federation.record.run_folder import RunFolder, opened, resumed
from fedloom.federation.watch import Watch
from fedloom.federation.workplace import Found, find_data
from fedloom.models.attach import Models
from fedloom.models.forward import default_peft_model
from fedloom.models.loading import pick_device
from fedloom.models.saved import allow_any_attention, load_adapted
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.sites.flare.kits import provision
from fedloom.runtimes.sites.flare.services import CONNECTED, SILENT
from fedloom.runtimes.sites.join import Joined
from fedloom.runtimes.sites.join import settle as settle_site
from fedloom.runtimes.sites.order import FEDERATION
from fedloom.runtimes.sites.project import Project
from fedloom.runtimes.sites.supervisor import Server

log = logging.getLogger(__name__)

#: The most sites on one machine: each has three processes.
MOST_SITES = 16


def run_here(recipe: Recipe, out: Path, resume: bool, overwrite: bool, watch: Watch) -> Result:
    """Run a recipe with server and sites as children of this process. Raises UserError and RunFailed as `serve` does."""
    with opened(out, resume=resume, overwrite=overwrite) as folder:
        chosen = resumed(folder, recipe) if resume else recipe
        check_recipe(chosen)
        found = find_data(chosen)
        settle(chosen, found)
        sites = site_names(found.clients.clients)
    with _replaced(out / FEDERATION) if overwrite else contextlib.nullcontext():
        _serve_here(recipe.with_values(found.values), found, sites, out, resume, overwrite, watch)
    return result(out)


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[None]:
    """Empty `folder` for the block. Its old content is deleted afterwards, or restored if the block raises UserError."""
    before = folder / "before"
    shutil.rmtree(before, ignore_errors=True)
    old = list(folder.iterdir()) if folder.is_dir() else []
    before.mkdir(parents=True)
    for path in old:
        path.rename(before / path.name)
    try:
        yield
    except UserError:
        for path in folder.iterdir():
            if path != before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in before.iterdir():
            path.rename(folder / path.name)
        raise
    finally:
        shutil.rmtree(before, ignore_errors=True)


def _serve_here(
    recipe: Recipe, found: Found, sites: dict[str, str], out: Path, resume: bool, overwrite: bool, watch: Watch
) -> None:
    """Provision a server and its sites, divide the data, and run the recipe among them. `sites`: client → site."""
    kits = out / FEDERATION / "kits"
    project = Project.model_validate(
        {
            "name": "here",
            "server": {"host": "localhost", "port": free_port(), "also": ["127.0.0.1"]},
            "sites": [{"name": site, "client": client} for client, site in sites.items()],
        }
    )
    log.info(f"certificates for a server and {len(sites)} sites")
    provision(project, kits)
    deal(recipe, found, {client: out / FEDERATION / "data" / f"{site}.jsonl" for client, site in sites.items()})
    joined: dict[str, Joined] = {}
    try:
        for site in sites.values():
            settle_site(kits / site, {"data": str(out / FEDERATION / "data" / f"{site}.jsonl")})
            joined[site] = Joined(kits / site)

        def look() -> None:
            for site, one in joined.items():
                for text in one.look():
                    if text not in {CONNECTED, SILENT}:  # the server logs these itself
                        log.info(f"{site}: {text}")

        server = Server.open(kits / "server", None)
        how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "watch": watch}
        serve(server, recipe, out, **how, wait=300.0, during=look, dealt=True)
    finally:
        for one in joined.values():
            one.close()


def deal(recipe: Recipe, found: Found, files: dict[str, Path]) -> None:
    """Write each client's examples and questions into a file of its own."""
    corpus, clients = found.corpus, found.clients
    asking = found.suite is not None and not corpus.test
    asked = select_questions(corpus, clients, recipe.evaluation.limit, recipe.seed) if asking else {}
    for client, path in files.items():
        write_shard(path, corpus, clients.shards[client], asked.get(client, ()))


def site_names(clients: tuple[str, ...]) -> dict[str, str]:
    """Return client → a name that fits a certificate. Raises UserError for more than `MOST_SITES` clients."""
    if len(clients) > MOST_SITES:
        raise UserError(
            f"{len(clients)} sites are too many for one machine (three processes each, at most {MOST_SITES} sites): lower "
            "split.num_clients, or use runtime.name=simulator"
        )
    plain = [re.sub(r"[^A-Za-z0-9]+", "-", c).strip("-")[:40] for c in clients]
    sound = len({p.lower() for p in plain}) == len(plain) and all(p and p not in {"server", "admin"} for p in plain)
    return {c: p if sound else f"site-{i}" for i, (c, p) in enumerate(zip(clients, plain, strict=True), 1)}


def free_port() -> int:
    """Find a free port of loopback, outside the range from which the system gives ports to other processes."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(20_000, 30_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def result(out: Path) -> Result:
    """Read the result of a finished run from its folder."""
    folder = RunFolder(out)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    recipe = folder.stored_recipe()
    device = pick_device(recipe.runtime.device)
    if (out / "adapter").is_dir():
        model = load_adapted(recipe.model, out / "adapter", device)
    else:  # personal results stay with the sites
        model = Models(allow_any_attention(recipe.model), recipe.adapter, recipe.seed, device).adapted()
    return Result(summary, out, out / "report.html", default_peft_model(model), model.tokenizer)
