"""What the time of a round follows: the clients in it and nothing else; and what folding one update in costs.

CPU seconds of this process, from `round_started` to `checkpoint`. Every client has the same work. Runs take turns, so that a
slow spell of the machine falls on all; a run's number is the median of its rounds, a setting's that of its turns. S is the
model.

The last part decodes, checks and folds updates of 10 MB (a LoRA of 420 tensors) as the coordinator does: message → update →
in client order → `accept` → FedAvg; as in the simulator, whose messages stay in its process and have no digest, and as
messages from other processes and sites, whose digest is checked (docs/adr/0006-unsealed-messages.md). The two take turns.
The peak of memory is counted in updates, the message that was received included.

    python benchmarks/scaling.py                     about four minutes
    python benchmarks/scaling.py --updates 100 --turns 1

Prints round_seconds_SAMPLED= for each, r_squared= and seconds_per_client= of the line through them,
population_POPULATION_round_seconds= and population_time_ratio=, aggregate_ms_per_update= (in process),
aggregate_sealed_ms_per_update= (from elsewhere), digest_ms_per_update= (sha256 of the message alone) and
aggregate_memory_updates=. The exit code is 1 where r_squared is under 0.99, population_time_ratio over 1.1,
aggregate_ms_per_update over 8 or aggregate_memory_updates over 4.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import fedloom  # noqa: F401  isort: skip  sets what torch reads when it is imported
import numpy as np
import torch
from small import equal_rows, recipe_values, small_model

from fedloom import Recipe, run
from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.algorithms.base import Algorithm
from fedloom.federation.rounds.synchronous import ClientOrder
from fedloom.federation.watch import Watch
from fedloom.messages import wire
from fedloom.messages.types import Payload, Update
from fedloom.models.layout import Adapter, Layout
from fedloom.recipe.recipe import AdapterConfig

#: (inputs, outputs) of the linear layers of a decoder block of SmolLM2-135M.
BLOCK = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576), "gate": (576, 1536), "up": (576, 1536),
         "down": (1536, 576)}  # fmt: skip


def round_seconds(recipe: Recipe, out: Path) -> float:
    """The median of a run's rounds but the first, CPU seconds."""
    began, seconds = 0.0, []

    def note(event: dict[str, Any]) -> None:
        nonlocal began
        if event["event"] == "round_started":
            began = time.process_time()
        elif event["event"] == "checkpoint":
            seconds.append(time.process_time() - began)

    run(recipe, out=out, overwrite=out.exists(), watch=Watch(event=note))
    return median(seconds[1:])


def in_turns(recipes: dict[int, Recipe], turns: int, scratch: Path) -> dict[int, float]:
    seconds: dict[int, list[float]] = {n: [] for n in recipes}
    for _ in range(turns):
        for n, recipe in recipes.items():
            seconds[n].append(round_seconds(recipe, scratch / f"run-{n}"))
    return {n: median(own) for n, own in seconds.items()}


def r_squared(x: list[float], y: list[float]) -> tuple[float, float]:
    """(R², slope) of the least-squares line."""
    slope, start = np.polyfit(x, y, 1)
    rest = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return 1 - rest / sum((b - float(np.mean(y))) ** 2 for b in y), float(slope)


def large_layout() -> Layout:
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(30):
        for name, (inputs, outputs) in BLOCK.items():
            shapes |= {
                f"model.layers.{layer}.{name}.lora_A.weight": (8, inputs),
                f"model.layers.{layer}.{name}.lora_B.weight": (outputs, 8),
            }
    return Layout(shapes)


def peak_since(reset: bool = False) -> int:
    """The most resident bytes since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Folding:
    """A FedAvg server that messages are folded into, each received in memory of its own."""

    def __init__(self, flat: torch.Tensor, scratch: Path, sealed: bool) -> None:
        layout = large_layout()
        self.sealed, self.scratch, self.spent = sealed, scratch, []
        sent = Update("", 1, Payload(layout.views(flat)), num_examples=3, metrics={"loss": 1.0})
        self.message = wire.encode_outcome(sent, sealed=sealed)
        self.server: Algorithm = FedAvg(FedAvg.Options(), 0, AdapterConfig())
        self.server.shared = Adapter(layout)
        self.server.model = SimpleNamespace()  # type: ignore[assignment]

    def fold(self, updates: int) -> None:
        """One round of so many updates. Adds its CPU seconds for each to `spent`, receiving left out."""
        order, receiving = [f"client-{k}" for k in range(updates)], 0.0

        def arriving() -> Iterator[Update]:
            nonlocal receiving
            for client in order:
                began = time.process_time()
                received = b"".join([memoryview(self.message)[:-1], self.message[-1:]])  # one copy
                receiving += time.process_time() - began
                update = replace(wire.decode_outcome(received, sealed=self.sealed), client=client)
                del received
                assert isinstance(update, Update)
                self.server.accept(update)
                line.add(update)
                del update
                yield cast(Update, line.next())

        began = time.process_time()
        with ClientOrder(order, self.scratch) as line:
            self.server.aggregate(arriving())
        self.spent.append((time.process_time() - began - receiving) / updates)


def aggregate(updates: int, scratch: Path, rounds: int = 10) -> tuple[float, float]:
    """Fold `updates` messages of each kind, in rounds that take turns: milliseconds for one in process, memory in them."""
    flat = torch.randn(large_layout().numel)
    ways = [Folding(flat, scratch, sealed) for sealed in (False, True)]
    digests = []
    for way in ways:
        way.fold(3)
        way.spent.clear()
    gc.freeze()  # as experiment.run does
    before = peak_since(reset=True)
    for _ in range(rounds):
        for way in ways:
            way.fold(max(1, updates // rounds))
        began = time.process_time()
        for _ in range(5):
            hashlib.sha256(ways[0].message).digest()
        digests.append((time.process_time() - began) / 5)
    peak = peak_since() - before
    gc.unfreeze()
    assert all(torch.equal(way.server.shared.flat, flat) for way in ways), "the mean of equal updates is not the update"
    plain, sealed = (median(way.spent) for way in ways)
    print(f"update_bytes={len(ways[0].message)}")
    print(f"aggregate_ms_per_update={plain * 1e3:.2f}")
    print(f"aggregate_sealed_ms_per_update={sealed * 1e3:.2f}")
    print(f"digest_ms_per_update={median(digests) * 1e3:.2f}")
    print(f"aggregate_memory_updates={peak / (flat.numel() * 4):.2f}", flush=True)
    return plain * 1e3, peak / (flat.numel() * 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampled", type=int, nargs="+", default=[2, 8, 16, 24, 32, 40])
    parser.add_argument("--population", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--updates", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        milliseconds, held_updates = aggregate(arguments.updates, folder / "early")
        model = small_model(folder / "model")
        rows = equal_rows(folder / "rows.jsonl", 2 * max(arguments.sampled))
        all_of_them = recipe_values(model, rows, max(arguments.sampled))
        counts = {
            n: Recipe.parse(all_of_them, {"federation.clients_per_round": n, "federation.rounds": arguments.rounds})
            for n in arguments.sampled
        }
        found = in_turns(counts, arguments.turns, folder)
        for n, seconds in found.items():
            print(f"round_seconds_{n}={seconds:.4f}")
        fit, slope = r_squared([float(n) for n in found], list(found.values()))
        print(f"seconds_per_client={slope:.5f}")
        print(f"r_squared={fit:.4f}", flush=True)
        crowd = equal_rows(folder / "crowd.jsonl", 2 * arguments.population)
        sampled = {"federation.clients_per_round": 10, "federation.rounds": 2 * arguments.rounds}
        populations = {n: Recipe.parse(recipe_values(model, crowd, n), sampled) for n in (10, arguments.population)}
        found = in_turns(populations, arguments.turns, folder)
        for n, seconds in found.items():
            print(f"population_{n}_round_seconds={seconds:.4f}")
        ratio = found[arguments.population] / found[10]
        print(f"population_time_ratio={ratio:.3f}")
    broken = [name for name, held in (
        ("r_squared", fit >= 0.99), ("population_time_ratio", ratio <= 1.1),
        ("aggregate_ms_per_update", milliseconds <= 8), ("aggregate_memory_updates", held_updates <= 4),
    ) if not held]  # fmt: skip
    if broken:
        print(f"beyond its limit: {', '.join(broken)}", file=sys.stderr)
    return bool(broken)


if __name__ == "__main__":
    raise SystemExit(main())
