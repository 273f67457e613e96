"""What the distributed runtime costs: three sites on loopback, the real engine, mutual TLS, as `name=value` lines.

    python benchmarks/distributed.py                   everything: five minutes, and 8 GB of memory for the broadcast
    python benchmarks/distributed.py --only rounds     rounds, echo or broadcast
    python benchmarks/distributed.py --only broadcast --bytes 600000000

    round_overhead_seconds=     rounds of a real run (coordinator, aggregation, checkpoints) of three sites with adapters of
                                10 MB, whose trainers sleep for a second instead of training: median time from one round's
                                end to the next one's, less that second
    round_cpu_seconds=          CPU time of all their processes for one such round, which a busy machine changes less
    engine_echo_seconds=        100 MB to two sites and back by the engine alone, one message each; the median of five, which
                                take turns with ours
    echo_seconds=               the same by our runtime: assignments from tensors to tensors, digests, checks, agents, audit
                                logs and trainers' processes in between
    echo_ratio=                 ours over the engine's
    broadcast_seconds=          2 GB from tensors on the server to tensors in one site's trainer
    broadcast_memory_ratio=     most memory of all of the server's processes in that time, less what they had before there
                                was a payload, over the payload's 2 GB; the payload itself counts

The exit code is 1 where the overhead is over 0.5, the echo's ratio over 2 or the broadcast's over 2. Memory is resident
memory, looked at twenty times a second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.recipe.recipe import Recipe

import psutil  # isort: skip

from fedloom.experiment.local_sites import free_port
from fedloom.federation.record.events import read_events
from fedloom.models.loading import quiet_transformers
from fedloom.runtimes.sites.flare.kits import SERVER_CLASS, SITE_CLASS, provision
from fedloom.runtimes.sites.flare.services import Admin, Service, server_service, site_service, write_job
from fedloom.runtimes.sites.join import settle
from fedloom.runtimes.sites.order import Order
from fedloom.runtimes.sites.project import Project

HERE = Path(__file__).parent
SITES = ("site-a", "site-b", "site-c")
SLEEP, ROUNDS = 1.0, 12
ECHO_BYTES, BROADCAST_BYTES = 100_000_000, 2_000_000_000
PATIENCE = 480.0


class Federation:
    """A server and three sites on loopback, for one job after another. Their kits allow a benchmark's classes too.

    Args:
        clients: site → its client; null names them alike.
        settings: site → what its own file says beside the client.
        own: site → environment of its service.
        site_class: what a job may start at a site, besides the real one.
    """

    def __init__(
        self,
        folder: Path,
        clients: Mapping[str, str] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        own: Mapping[str, Mapping[str, str]] | None = None,
        site_class: str = "distributed_jobs.PlainSite",
    ) -> None:
        self.folder = folder
        kits = folder / "kits"
        server = {"host": "localhost", "port": free_port(), "also": ["127.0.0.1"]}
        sites = [{"name": site, "client": (clients or {}).get(site, site)} for site in SITES]
        self.project = Project.model_validate({"name": "benchmark", "server": server, "sites": sites})
        provision(self.project, kits)
        (folder / "none.jsonl").touch()
        self.environment = {
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "FEDLOOM_BENCH": str(folder),
            "FEDLOOM_ORDER": str(folder / "order.json"),
        }
        self._allow(kits / "server", ["distributed_jobs.Measured"])
        for site in SITES:
            self._allow(kits / site, [site_class])
            settle(kits / site, (settings or {}).get(site, {"data": str(folder / "none.jsonl")}))
        self.server = server_service(kits / "server", self.environment)
        self.services: list[Service] = [self.server]
        for site in SITES:
            more = {"FEDLOOM_SITE": str(kits / site / "home" / "site.yaml"), "FEDLOOM_BENCH_SLEEP": str(SLEEP)}
            self.services.append(
                site_service(kits / site, site, self.environment | more | dict((own or {}).get(site, {})))
            )
        self.admin = Admin(kits / "admin", self.project.admin)
        self._await(lambda: len(self.admin.connected()) == len(SITES), "the sites")

    def _allow(self, kit: Path, classes: list[str]) -> None:
        path = kit / "local" / "resources.json"
        resources = json.loads(path.read_text(encoding="utf-8"))
        resources["class_allow_list"] += classes
        path.write_text(json.dumps(resources), encoding="utf-8")

    def _await(self, condition: Any, what: str) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > until:
                raise SystemExit(f"{what} did not come within {PATIENCE:g} seconds: see {self.folder}")
            time.sleep(0.1)

    def job(self, server: str, site: str, answer: str, orders: dict[str, Any] | None = None) -> dict[str, Any]:
        """One job from its beginning to its end; what it wrote into the file `answer`."""
        path = self.folder / answer
        for old in ("found.json", "idle.json", "outcome.json"):
            (self.folder / old).unlink(missing_ok=True)
        (self.folder / "bench.json").write_text(json.dumps(orders), encoding="utf-8")
        job = write_job(self.folder / "job", "benchmark", len(SITES))
        for party, was, now in (("server", SERVER_CLASS, server), ("client", SITE_CLASS, site)):
            config = job / "app" / "config" / f"config_fed_{party}.json"
            config.write_text(config.read_text(encoding="utf-8").replace(was, now), encoding="utf-8")
        number = self.admin.submit(job)
        self._await(path.is_file, f"the end of {server}")
        self._await(lambda: self.admin.status(number).startswith("FINISHED"), f"the engine's end of {server}")
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        if "error" in found or found.get("code"):
            raise SystemExit(f"{server}: {found}")
        return found

    def cpu(self) -> float:
        """CPU seconds that all processes of the server and the sites have taken so far."""
        total = 0.0
        for service in self.services:
            for process in [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]:
                try:
                    times = process.cpu_times()
                except psutil.NoSuchProcess:
                    continue
                total += times.user + times.system
        return total

    def memory(self) -> int:
        """Bytes that the server's processes have now."""
        total = 0
        for process in [psutil.Process(self.server.pid), *psutil.Process(self.server.pid).children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def close(self) -> None:
        self.admin.close()
        for service in reversed(self.services):
            service.close()


def rounds(federation: Federation) -> dict[str, float]:
    """A run as `fedloom serve` has it, in one job."""
    sys.path.insert(0, str(HERE.parent))
    from tests.helpers import tiny

    with quiet_transformers():
        model = tiny.save_model(
            federation.folder / "model", tiny.causal_lm(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
        )
    recipe = Recipe.parse(
        {
            "name": "rounds",
            "model": str(model),
            "data": {"path": str(federation.folder / "none.jsonl"), "template": "plain"},
            "adapter": {"rank": 150, "alpha": 16, "target_modules": "all-linear"},
            "train": {"steps": 1},
            "federation": {"rounds": ROUNDS, "min_clients": len(SITES)},
            "evaluation": {"suite": None, "answers": 0, "every": 0},
        }
    )
    out = federation.folder / "run"
    project = federation.project.model_dump(mode="json")
    Order(recipe.resolved(), str(out), False, False, project, str(federation.folder)).write(
        federation.folder / "order.json"
    )
    looks: dict[int, tuple[float, float]] = {}  # rounds finished → (when, CPU seconds)
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            path = out / "events.jsonl"
            done = sum(e["event"] == "round_finished" for e in read_events(path)) if path.is_file() else 0
            looks.setdefault(done, (time.time(), federation.cpu()))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        federation.job(SERVER_CLASS, "distributed_jobs.PlainSite", "outcome.json")
    finally:
        over.set()
        looking.join()
    first, last = min(n for n in looks if n >= 2), max(n for n in looks if n < ROUNDS)
    cpu = (looks[last][1] - looks[first][1]) / (last - first)
    events = list(read_events(out / "events.jsonl"))
    ends = [e["time"] for e in events if e["event"] == "round_finished"]
    bytes_up = [e["upload_bytes"] for e in events if e["event"] == "client_update"]
    assert len(bytes_up) == ROUNDS * len(SITES), "a site is missing from a round"
    spent = [b - a - SLEEP for a, b in itertools.pairwise(ends[1:])]  # the first round brings sites up
    return {
        "adapter_bytes": statistics.median(bytes_up),
        "round_cpu_seconds": cpu,
        "round_overhead_seconds": statistics.median(spent),
    }


def echo(federation: Federation) -> dict[str, float]:
    orders = {"sites": SITES[:2], "bytes": ECHO_BYTES, "times": 6, "keep": False, "idle": 0.0}
    got = federation.job("distributed_jobs.Measured", "distributed_jobs.PlainSite", "found.json", orders)
    ours, engine = (statistics.median(got[name][1:]) for name in ("ours", "engine"))  # the first brings memory up
    return {"engine_echo_seconds": engine, "echo_seconds": ours, "echo_ratio": ours / engine}


def broadcast(federation: Federation, size: int = BROADCAST_BYTES) -> dict[str, float]:
    orders = {"sites": SITES[:1], "bytes": size, "times": 1, "keep": True, "idle": 2.0}
    idle, most, over = 0, 0, threading.Event()

    def look() -> None:
        nonlocal idle, most
        since = None
        while not over.wait(0.05):
            if not (federation.folder / "idle.json").is_file():
                continue
            since = since or time.monotonic()
            now = federation.memory()
            if time.monotonic() < since + 1.5:
                idle = max(idle, now)
            most = max(most, now)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        got = federation.job("distributed_jobs.Measured", "distributed_jobs.PlainSite", "found.json", orders)
    finally:
        over.set()
        looking.join()
    print(f"broadcast_idle_bytes={idle}\nbroadcast_peak_bytes={most}")
    return {"broadcast_seconds": got["ours"][0], "broadcast_memory_ratio": (most - idle) / size}


LIMITS = {"round_overhead_seconds": 0.5, "echo_ratio": 2.0, "broadcast_memory_ratio": 2.0}


def main() -> int:
    parts: dict[str, Any] = {"rounds": rounds, "echo": echo, "broadcast": broadcast}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(parts), choices=list(parts))
    parser.add_argument("--bytes", type=int, default=BROADCAST_BYTES, help="of the broadcast")
    arguments = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder))
        try:
            for name in arguments.only:
                more = {"size": arguments.bytes} if name == "broadcast" else {}
                for key, value in parts[name](federation, **more).items():
                    print(f"{key}={value:.4g}" if key not in {"adapter_bytes"} else f"{key}={value:.0f}", flush=True)
                    if value > LIMITS.get(key, value):
                        wrong.append(f"{key}={value:.3g}")
        finally:
            federation.close()
    if wrong:
        print(f"not as it should be: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
