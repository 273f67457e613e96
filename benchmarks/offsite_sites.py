"""Offsite tuning between three sites, and what of the model has reached them: `fedot` on fed-gsm-symbolic, the real engine.

    python benchmarks/offsite_sites.py             5 minutes on two busy cores, 10 GB of memory, 3 GB of disk
    python benchmarks/offsite_sites.py --model PATH train.steps=2

A server and three sites on loopback, each with an empty cache of its own (FEDLOOM_HOME, HF_HOME) and no hub. What arrives
at a site's process is written down byte by byte before its agent sees it. Few steps: the plug-in has to be the simulator's,
not good. Weights of the dropped layers are looked for by 256 bytes from the middle of each, in fp32, bf16 and fp16, their
names as text; in what arrived, and in every file that a site has afterwards. Lines:

    plug_in.sites=  plug_in.simulator=    sha256 of both;  plug_in.equal=yes|no
    received_bytes=                       of all sites
    dropped_layers=                       their numbers;  dropped_tensors=  how many weights were looked for
    dropped_layers_received=0             finds in what arrived, and in files
    kept_layers_received=                 weights of kept layers that the same search found in what arrived, of how many
    site_caches_empty=yes|no              no file in them before the run and none that could be a model after it

The exit code is 1 where the plug-ins differ, a dropped layer was found, a kept one was not, or a cache was filled.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedloom.recipe.recipe import Recipe

import torch  # isort: skip
from distributed import SITES, Federation

from fedloom.algorithms.build import make
from fedloom.experiment.local_sites import deal
from fedloom.experiment.run import run
from fedloom.federation.record.run_folder import RunFolder
from fedloom.federation.watch import Watch
from fedloom.federation.workplace import find_data
from fedloom.models.emulator.cut import cut_model
from fedloom.models.loading import load_base
from fedloom.recipe.overrides import parse_overrides
from fedloom.runtimes.ranks.worker import end_with_parent
from fedloom.runtimes.sites.flare.executor import SiteExecutor, open_agent
from fedloom.runtimes.sites.flare.kits import SERVER_CLASS
from fedloom.runtimes.sites.flare.link import attend
from fedloom.runtimes.sites.link import Answer, Bytes
from fedloom.runtimes.sites.order import Order
from fedloom.runtimes.sites.project import SiteConfig, load_section

FEW = {
    "data.limit": 60,
    "train.steps": 1,
    "train.batch_size": 2,
    "federation.rounds": 2,
    "federation.min_clients": 3,
    "algorithm.reference": False,
    "runtime.threads": 1,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RecordingSite(SiteExecutor):
    """A site's job that writes down what arrives, before it does what a site's job does."""

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type != "_start_run":
            super().handle_event(event_type, fl_ctx)
            return
        end_with_parent()
        site = load_section(SiteConfig, Path(os.environ["FEDLOOM_SITE"]), "the site's file")
        agent = self._agent = open_agent(site)
        received = Path(os.environ["FEDLOOM_BENCH"]) / f"received-{site.client}"

        def answer(header: Any, data: Bytes) -> Answer:
            with received.open("ab") as file:
                file.write(data)
            return agent.answer(header, data)

        attend(fl_ctx.get_engine(), fl_ctx.get_job_id(), answer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another model than the recipe's")
    parser.add_argument("--folder", type=Path, help="a new folder for kits, logs and runs, which stays")
    parser.add_argument("overrides", nargs="*", help="key=value, as for `fedloom run fedot`")
    given = parser.parse_args()
    model = {"model": given.model} if given.model else {}
    recipe = Recipe.load("fedot", {**FEW, **model, **parse_overrides(given.overrides)})
    with tempfile.TemporaryDirectory(prefix="fedloom-offsite-") as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return shown(recipe, folder)


def shown(recipe: Recipe, folder: Path) -> int:
    simulated = run(recipe, folder / "simulated", watch=Watch(say=lambda t: print(t, file=sys.stderr, flush=True)))
    caches = {site: folder / "caches" / site for site in SITES}
    for cache in caches.values():
        cache.mkdir(parents=True)
    before = sum(1 for _ in files_in(*caches.values()))
    sites = between(recipe, folder, caches)
    digests = [str(s["adapter_sha256"]) for s in (sites, simulated.summary)]
    arrived = sorted(folder.glob("received-*"))
    print(f"plug_in.sites={digests[0]}\nplug_in.simulator={digests[1]}")
    print(f"plug_in.equal={'yes' if digests[0] == digests[1] else 'no'}")
    print(f"received_bytes={sum(p.stat().st_size for p in arrived)}", flush=True)
    dropped, kept = weights(recipe)
    homes = [*files_in(*(folder / "kits" / site for site in SITES)), *files_in(*caches.values())]
    layers = sorted({n.split(".")[2] for n in dropped}, key=int)
    print(f"dropped_layers={','.join(layers)}\ndropped_tensors={len(dropped)}")
    names = [f"layers.{layer}.".encode() for layer in layers]
    found = sum(finds(path, dropped, names) for path in [*arrived, *homes])
    control = finds(arrived[0], kept, [])
    print(f"dropped_layers_received={found}\nkept_layers_received={control} of {len(kept)}")
    after = [p for p in files_in(*caches.values()) if p.stat().st_size > 1 << 20]
    empty = before == 0 and not after
    print(f"site_caches_empty={'yes' if empty else 'no'}", flush=True)
    return int(digests[0] != digests[1] or found > 0 or control != len(kept) or not empty)


def between(recipe: Recipe, folder: Path, caches: dict[str, Path]) -> dict[str, Any]:
    """The run between sites, each with its part of the corpus and a cache of its own; its summary."""
    found = find_data(recipe)
    clients = found.clients
    data = {site: folder / "data" / f"{site}.jsonl" for site in SITES}
    deal(recipe, found, dict(zip(clients.clients, data.values(), strict=True)))
    own = {
        site: {"FEDLOOM_HOME": str(cache), "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "1"}
        for site, cache in caches.items()
    }
    recording = "offsite_sites.RecordingSite"
    federation = Federation(
        folder, dict(zip(SITES, clients.clients, strict=True)), {s: {"data": str(data[s]), "threads": 1} for s in SITES},
        own, recording,
    )  # fmt: skip
    out = folder / "run"
    try:
        project = federation.project.model_dump(mode="json")
        Order(recipe.resolved(), str(out), False, False, project, str(folder)).write(folder / "order.json")
        federation.job(SERVER_CLASS, recording, "outcome.json")
    finally:
        federation.close()
    return dict(RunFolder(out).read("summary.json") or {})


def weights(recipe: Recipe) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Name → weight: those of the dropped layers, and some of the others. None that is one number over and over."""
    model, options = load_base(recipe.model).model, make(recipe).options
    left_out = cut_model(model, options.bottom, options.top, options.dropped).dropped
    told = {n: p.detach() for n, p in model.named_parameters() if n.split(".")[1:2] == ["layers"] and p.numel() > 4096}
    dropped = {n: p for n, p in told.items() if int(n.split(".")[2]) in left_out}
    kept = {n: p for n, p in told.items() if int(n.split(".")[2]) not in left_out}
    if not dropped or not kept:
        raise SystemExit("no layer was dropped, or none was kept: there is nothing to look for")
    return dropped, dict(list(kept.items())[:: max(1, len(kept) // 20)])


def finds(path: Path, weights: dict[str, torch.Tensor], names: list[bytes]) -> int:
    """How many of the weights, and of the names, are in a file."""
    if path.stat().st_size == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = sum(data.find(name) >= 0 for name in names)
        return found + sum(any(data.find(needle) >= 0 for needle in needles(w)) for w in weights.values())


def needles(weight: torch.Tensor) -> Iterator[bytes]:
    flat = weight.reshape(-1)
    for dtype in DTYPES:
        size = 256 // dtype.itemsize
        piece = flat[flat.numel() // 2 :][:size].to(dtype)
        yield piece.contiguous().view(torch.uint8).numpy().tobytes()


def files_in(*folders: Path) -> Iterator[Path]:
    return (p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


if __name__ == "__main__":
    sys.exit(main())
