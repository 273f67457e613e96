"""What two ranks take beside one process, on the same CPU cores, turn and turn about: time, CPU and memory.

    python benchmarks/ranks.py [--steps 2] [--repeats 3] [--model smollm2-135m]

Three trainers are started: one process with two threads, two ranks of one thread each under ddp, and the same under fsdp.
Each is given the same training again and again. `ratio=` lines compare with the one process: below 1 is better. On other
machines' cores, or with others at work on these, the figures are others; the CPU seconds depend on that least.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch
from fedloom.messages import wire
from fedloom.messages.types import Assignment, Update
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.ranks.pool import LIMIT
from fedloom.runtimes.ranks.worker import Worker

VARIANTS = {
    "one process, 2 threads": {},
    "2 ranks, ddp": {"runtime.ranks": 2},
    "2 ranks, fsdp": {"runtime.ranks": 2, "runtime.parallel": "fsdp"},
}


def peak_megabytes(pid: int) -> float:
    """Resident memory at its highest, as Linux counts it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    recipe = Recipe.load("quickstart", {
        "model": options.model, "runtime.threads": 2, "runtime.device": "cpu", "train.steps": options.steps,
        "train.batch_size": 8, "evaluation.suite": None, "train.packing": "on",
    })  # fmt: skip
    setting = prepare(recipe, Watch())
    client = setting.found.clients.training_clients[0]
    work = wire.encode_assignment(
        Assignment("train", client, 1, 1, setting.algorithm.round_payload(client), steps=options.steps)
    )
    with tempfile.TemporaryDirectory() as folder:
        workers: dict[str, Worker] = {}
        try:
            measure(workers, setting.recipe, Path(folder), work, options.repeats)
        finally:
            for worker in workers.values():
                worker.close()


def measure(workers: dict[str, Worker], recipe: Recipe, folder: Path, work: bytes, repeats: int) -> None:
    for name, changes in VARIANTS.items():
        own = recipe.with_values(changes)
        worker = Worker([sys.executable, "-m", "fedloom.runtimes.ranks.main"], folder / "log", LIMIT, own.runtime.ranks)
        workers[name] = worker
        worker.ask({"kind": "prepare"}, json.dumps({"recipe": own.resolved(), "folder": str(folder / name)}).encode())
        worker.ask({"kind": "work"}, work)  # the first one loads the model
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    cpu: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            before, began = sum(map(cpu_seconds, worker.pids)), time.perf_counter()
            _, body = worker.ask({"kind": "work"}, work)
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(sum(map(cpu_seconds, worker.pids)) - before)
            outcome = wire.decode_outcome(body)
            assert isinstance(outcome, Update), outcome
    first = next(iter(workers))
    for name, worker in workers.items():
        peaks = " + ".join(f"{peak_megabytes(pid):.0f}" for pid in worker.pids)
        print(f"{name}: {statistics.median(seconds[name]):.2f} s, {statistics.median(cpu[name]):.2f} CPU s, {peaks} MB")
        if name != first:
            pairs = [a / b for a, b in zip(seconds[name], seconds[first], strict=True)]
            cpu_pairs = [a / b for a, b in zip(cpu[name], cpu[first], strict=True)]
            print(f"  time_ratio={statistics.median(pairs):.2f} cpu_ratio={statistics.median(cpu_pairs):.2f}")


if __name__ == "__main__":
    main()
