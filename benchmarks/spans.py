"""Time of a run by what it goes into: the seams of the project that benchmarks/profile.py times, and the sums.

The seams are the project's own functions, replaced for a while by ones that read the clock around them. A span's time is
without that of the spans within it, so whatever calls whatever, nothing is counted twice. What encloses much else (a
client's whole turn, and the aggregation, which pulls all turns of a round) has no name of its own: what is left of its time
is `rest`, and counts as not accounted for.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pairs import load
from small import recipe_values, small_model
from worded import worded_rows

from fedloom import Recipe, run
from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.algorithms.base import Algorithm
from fedloom.federation import client
from fedloom.federation.client import Client
from fedloom.federation.record.checkpoints import Checkpoints, ClientStore
from fedloom.federation.record.events import Events
from fedloom.federation.watch import Watch
from fedloom.messages import wire
from fedloom.messages.operators.channel import ClientChannel, ServerChannel
from fedloom.models.layout import WeightedMean
from fedloom.recipe.overrides import parse_overrides
from fedloom.training import trainer
from fedloom.training.objectives import Sft
from fedloom.training.trainer import LocalRun, Stepper

#: (whose, which function, what its own time is called).
SEAMS: list[tuple[Any, str, str]] = [
    (Algorithm, "local_loss", "forward"),
    (trainer, "backward", "backward"),
    (Stepper, "step", "optimiser"),
    (Stepper, "__init__", "setup"),
    (LocalRun, "fit", "setup"),
    (Sft, "batch", "batches"),
    (Algorithm, "receive", "swap"),
    (ClientStore, "load", "swap"),
    (ClientStore, "save", "swap"),
    (ServerChannel, "encode", "encode"),
    (ServerChannel, "decode", "encode"),
    (ClientChannel, "decode", "encode"),
    (ClientChannel, "encode", "encode"),
    (wire, "encode_assignment", "encode"),
    (wire, "decode_assignment", "encode"),
    (wire, "encode_outcome", "encode"),
    (wire, "decode_outcome", "encode"),
    (WeightedMean, "add", "aggregate"),
    (WeightedMean, "result", "aggregate"),
    (Algorithm, "accept", "aggregate"),
    (client, "round_indices", "setup"),
    (client, "loss_sums", "evaluate"),
    (Checkpoints, "save", "checkpoint"),
    (Checkpoints, "amend", "checkpoint"),
    (Events, "write", "events"),
    (FedAvg, "aggregate", "rest"),
    (Client, "handle", "rest"),
]
NAMES = [name for name in dict.fromkeys(name for _, _, name in SEAMS) if name != "rest"]


class Spans:
    """CPU seconds by name; what a span calls that has a name of its own is not counted twice."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner: list[float] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        began = time.process_time()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.process_time() - began
            self.seconds[name] += took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            with self.span(name):
                return function(*args, **keywords)

        return call


@contextmanager
def watched(spans: Spans) -> Iterator[None]:
    """In this block all seams are timed."""
    plain = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in SEAMS]
    for owner, attribute, name in SEAMS:
        setattr(owner, attribute, spans.timed(getattr(owner, attribute), name))
    try:
        yield
    finally:
        for owner, attribute, function in plain:
            setattr(owner, attribute, function)


def recipe_for(model: str, scratch: Path, overrides: dict[str, Any]) -> Recipe:
    small = model == "S"
    rows = worded_rows(scratch / "rows.jsonl", 400, (3, 9) if small else (12, 28))
    values = recipe_values(small_model(scratch / "model") if small else Path(model), rows, 4)
    train = {"steps": 10 if small else 4, "batch_size": 8, "lr": 1e-3}
    evaluation = {"suite": None, "answers": 0, "every": 1}
    split = {"splitter": "uniform", "num_clients": 4, "test": 0.1, "validation": 0.0}
    federation = {"rounds": 3 if small else 1}
    parts = {"train": train, "evaluation": evaluation, "split": split, "federation": federation}
    return Recipe.parse(values | parts, {"data.max_length": 192, **overrides})


def profiled(recipe: Recipe, out: Path) -> tuple[Counter[str], float, float]:
    """(CPU seconds by name, all CPU seconds, wall seconds) from the first round's start to the last evaluation."""
    spans = Spans()
    ends: list[tuple[float, float, Counter[str]]] = []

    def event(record: dict[str, Any]) -> None:
        if record["event"] == "round_started" and not ends:
            spans.seconds.clear()
            ends.append((time.process_time(), time.perf_counter(), Counter()))
        elif record["event"] == "evaluation" and record["round"] == recipe.federation.rounds:
            ends.append((time.process_time(), time.perf_counter(), Counter(spans.seconds)))

    with watched(spans):
        run(recipe, out=out, watch=Watch(event=event))
    (cpu, wall, _), (cpu_end, wall_end, seconds) = ends
    return seconds, cpu_end - cpu, wall_end - wall


def main(about: str) -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="S", help="S, or a model as in a recipe (smollm2-135m)")
    parser.add_argument("overrides", nargs="*", help="key=value, as for `fedloom run`")
    arguments = parser.parse_args()
    print(f"model={arguments.model} {load()}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        recipe = recipe_for(arguments.model, Path(name), parse_overrides(arguments.overrides))
        seconds, cpu, wall = profiled(recipe, Path(name) / "run")
    named = sum(seconds[name] for name in NAMES)
    for name in NAMES:
        print(f"{name}_share={seconds[name] / wall:.4f} {name}_cpu={seconds[name] / cpu:.4f}")
    print(f"idle_share={(wall - cpu) / wall:.4f}", f"rest_share={(cpu - named) / wall:.4f}", sep="\n")
    print(
        f"round_seconds={wall / recipe.federation.rounds:.2f}",
        f"round_cpu_seconds={cpu / recipe.federation.rounds:.2f}",
    )
    print(f"covered={named / cpu:.4f}", load(), sep="\n")
    if named / cpu < 0.98:
        print("missed: covered", file=sys.stderr)
        return 1
    return 0
