"""A whole federation on one machine: certificates, a server and every site as processes, on loopback.

For demonstrations and tests: the same commands' functions that organisations use, with the corpus split as the simulator
splits it and each site given its own part as a file. This file adds nothing to the server or to a site.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from fedloom.common.errors import UserError
from fedloom.data.corpus import Corpus, Partition
from fedloom.data.loading import load_data
from fedloom.data.shard_file import write_shard
from fedloom.data.splitters import partition, select_questions
from fedloom.evaluation.pick_suite import pick_suite
from fedloom.experiment.run import Result
from fedloom.experiment.sites import checked, serve
from fedloom.federation.record.run_folder import RunFolder
from fedloom.federation.rounds.schedule import make_schedule
from fedloom.federation.watch import Watch
from fedloom.models.attach import Models
from fedloom.models.forward import release
from fedloom.models.loading import pick_device
from fedloom.models.saved import anywhere, load_adapted
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.sites.flare.kits import provision
from fedloom.runtimes.sites.flare.services import CONNECTED, SILENT
from fedloom.runtimes.sites.join import Joined, settle
from fedloom.runtimes.sites.order import FEDERATION
from fedloom.runtimes.sites.project import Project
from fedloom.runtimes.sites.supervisor import Server

#: Sites on one machine: each has three processes.
MOST_SITES = 16


def run_here(recipe: Recipe, out: Path, resume: bool, overwrite: bool, watch: Watch) -> Result:
    """A run with its server and sites as children of this process. Raises UserError and RunFailed as `serve` does."""
    if overwrite:
        shutil.rmtree(out / FEDERATION, ignore_errors=True)
    checked(recipe)
    corpus, recipe = load_data(recipe, watch.say)
    clients = partition(corpus, recipe.split, recipe.seed)
    make_schedule(recipe, checked(recipe), clients)
    kits = out / FEDERATION / "kits"
    sites = site_names(clients.clients)
    project = Project.model_validate(
        {
            "name": "here",
            "server": {"host": "localhost", "port": free_port(), "also": ["127.0.0.1"]},
            "sites": [{"name": site, "client": client} for client, site in sites.items()],
        }
    )
    watch.say(f"certificates for a server and {len(sites)} sites")
    provision(project, kits)
    deal(
        recipe, corpus, clients, {client: out / FEDERATION / "data" / f"{site}.jsonl" for client, site in sites.items()}
    )
    joined: list[Joined] = []
    try:
        for site in sites.values():
            settle(kits / site, {"data": str(out / FEDERATION / "data" / f"{site}.jsonl")})
            joined.append(Joined(kits / site, _of_note(site, watch)))

        def look() -> None:
            for one in joined:
                one.look()

        server = Server.open(kits / "server", None)
        serve(server, recipe, out, resume=resume, overwrite=overwrite, watch=watch, wait=300.0, during=look)
    finally:
        for one in joined:
            one.close()
    return result(out, watch)


def _of_note(site: str, watch: Watch) -> Callable[[str], None]:
    """Says what a site says, but for its coming and going, which the server tells."""

    def say(text: str) -> None:
        if text not in {CONNECTED, SILENT}:
            watch.say(f"{site}: {text}")

    return say


def deal(recipe: Recipe, corpus: Corpus, clients: Partition, files: dict[str, Path]) -> None:
    """Each client's examples and questions into a file of its own."""
    suite, _ = pick_suite(recipe, corpus)
    asked = select_questions(corpus, clients, recipe.evaluation.limit, recipe.seed) if suite and not corpus.test else {}
    for client, path in files.items():
        write_shard(path, corpus, clients.shards[client], asked.get(client, ()))


def site_names(clients: tuple[str, ...]) -> dict[str, str]:
    """Client → a name that a certificate can carry. Raises UserError where there are too many for one machine."""
    if len(clients) > MOST_SITES:
        raise UserError(
            f"{len(clients)} sites are too many for one machine (three processes each, at most {MOST_SITES} sites): lower "
            "split.num_clients, or use runtime.name=simulator"
        )
    plain = [re.sub(r"[^A-Za-z0-9]+", "-", c).strip("-")[:40] for c in clients]
    sound = len({p.lower() for p in plain}) == len(plain) and all(p and p not in {"server", "admin"} for p in plain)
    return {c: p if sound else f"site-{i}" for i, (c, p) in enumerate(zip(clients, plain, strict=True), 1)}


def free_port() -> int:
    """A port of loopback that nobody uses, outside the range from which the system gives others theirs in the meantime."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(20_000, 30_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def result(out: Path, watch: Watch) -> Result:
    """What a finished run left in its folder."""
    folder = RunFolder(out)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    recipe = folder.stored_recipe()
    device = pick_device(recipe.runtime.device)
    if (out / "adapter").is_dir():
        model = load_adapted(recipe.model, out / "adapter", device, watch.say)
    else:  # personal results stay with the sites
        model = Models(anywhere(recipe.model), recipe.adapter, recipe.seed, device, watch.say).adapted()
    return Result(summary, out, out / "report.html", release(model), model.tokenizer)
