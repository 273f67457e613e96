"""What the simulator costs beside training: CPU time of its rounds over CPU time inside the optimiser steps.

    python benchmarks/overhead.py                         S, a Llama of 7.6M parameters: 9 CPU minutes
    python benchmarks/overhead.py --pairs 0               the first ratio alone: a minute
    python benchmarks/overhead.py --model smollm2-135m --pairs 0      M: 7 CPU minutes; an hour and a half with pairs

The simulator and the bare loop call the same function for a step, `Stepper.step` of training/trainer.py. All else is the
simulator's own: sampling, messages both ways with their digests, swapping adapters, making batches, optimisers, what clients
keep, aggregation, checkpoints, events. Imports, loading, evaluation and the report lie outside.

    overhead_ratio=   one run of 4 clients, 3 rounds, 10 steps: CPU seconds from the event `round_started` of the first round
                      to `checkpoint` of the last, over those from the beginning to the end of each step; at most 1.02
    pair_ratio=       rounds of the simulator against the bare loop over the same batches, which are made beforehand: the
                      median over pairs, in the order A B B A. A round is one client's 10 steps here, so that a round's
                      aggregation, checkpoint and events fall on one client and not on four
    same_ratio=       the bare loop against itself in the same way: what the method makes of no difference (A/A)
    busy_ratio=       the bare loop with 2 % of each step's time burnt after it, against itself
    …_error=          the standard error of each

LoRA of rank 8 on all linear layers, AdamW, 8 examples of some 60 tokens a step. The exit code is 1 where overhead_ratio or
pair_ratio is over 1.02, and where the pairs decide nothing: A/A off by more than 1 %, or the 2 % not seen as 1 to 3 %.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bare import bare
from pairs import load, ratio, spread
from small import recipe_values, small_model
from worded import worded_rows

from fedloom import Recipe
from fedloom.data.batching import Batch, Plan, collate, round_indices
from fedloom.experiment.assemble import assemble
from fedloom.experiment.prepare import Setting, prepare
from fedloom.federation.record.run_folder import opened
from fedloom.federation.watch import Watch
from fedloom.training.trainer import Stepper

CLIENTS, ROUNDS, STEPS, LIMIT = 4, 3, 10, 1.02

#: Words of an example, so that one has some 60 tokens: S spells a word out, M has a token or two for it.
WORDS = {"S": (3, 9), "smollm2-135m": (12, 28)}


def recipe_for(model: str, scratch: Path, **federation: int) -> Recipe:
    rows = worded_rows(scratch / "rows.jsonl", CLIENTS * STEPS * 8, WORDS.get(model, WORDS["smollm2-135m"]))
    folder = small_model(scratch / "model") if model == "S" and not (scratch / "model").exists() else scratch / "model"
    values = recipe_values(folder if model == "S" else Path(model), rows, CLIENTS)
    train = {"steps": STEPS, "batch_size": 8, "lr": 1e-3, "schedule": "constant"}
    return Recipe.parse(values | {"train": train, "federation": federation}, {"data.max_length": 192})


@contextmanager
def timed_steps() -> Iterator[list[float]]:
    """In this block each step's CPU seconds are noted, read at its two ends."""
    plain, seconds = Stepper.step, []

    def step(self: Stepper, number: int, batches: Sequence[Batch], rate: float) -> None:
        started = time.process_time()
        plain(self, number, batches, rate)
        seconds.append(time.process_time() - started)

    Stepper.step = step  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Stepper.step = plain  # type: ignore[method-assign]


class Rounds:
    """A run of the simulator, and its CPU seconds by what it writes into its events."""

    def __init__(self, setting: Setting, after: Callable[[int], None] = lambda round: None) -> None:
        self.setting, self.after = setting, after
        self.seconds: list[float] = []
        self.first = self.last = self._began = 0.0

    def event(self, record: dict[str, Any]) -> None:
        now = time.process_time()
        if record["event"] == "round_started":
            self._began = now
            self.first = self.first or now
        elif record["event"] == "checkpoint":
            self.seconds.append(now - self._began)
            self.last = now
            self.after(record["round"])

    def run(self, folder: Path) -> None:
        with opened(folder, resume=False, overwrite=False) as out:
            coordinator = assemble(self.setting, out, resume=False, watch=Watch(event=self.event))
            coordinator.run()
            coordinator.close()


def round_batches(setting: Setting, round: int) -> list[list[list[Batch]]]:
    """Client → step → forward passes: what the simulator's clients train on in this round."""
    recipe, data = setting.recipe, setting.data
    plan = Plan(recipe.train.batch_size, recipe.train.accumulation, recipe.train.steps, None)
    return [
        [
            [collate([data.sequences[i] for i in p], packed=True, pad=0, examples=p) for p in step]
            for step in round_indices(data.client(client).train, plan, round, recipe.seed, client)
        ]
        for client in setting.schedule.sample(round)
    ]


def one_run(setting: Setting, folder: Path) -> tuple[float, float]:
    """(seconds of the rounds, of the steps within) of one job."""
    rounds = Rounds(setting)
    with timed_steps() as steps:
        rounds.run(folder)
    assert len(steps) == CLIENTS * ROUNDS * STEPS
    return rounds.last - rounds.first, sum(steps)


def in_pairs(setting: Setting, folder: Path) -> dict[str, list[float]]:
    """Seconds of each kind, pair by pair.

    Round r of the simulator is A_r. After an odd round come B_r C_r D_r and then, for the next one, D C B, so that A, B,
    the control C and the busy loop D each stand beside what they are compared with, in an order that turns round.
    """
    found: dict[str, list[float]] = {"B": [], "C": [], "D": []}
    busy = {"B": 0.0, "C": 0.0, "D": 0.02}

    def after(round: int) -> None:
        if round % 2:
            for number, names in ((round, "BCD"), (round + 1, "DCB")):
                batches = round_batches(setting, number)
                for name in names:
                    found[name].append(bare(setting.model, setting.recipe.train, batches, busy[name]))

    rounds = Rounds(setting, after)
    rounds.run(folder)
    found["A"] = rounds.seconds
    return {name: seconds[2:] for name, seconds in found.items()}  # the first two warm up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="S", help="S, or a model as in a recipe (smollm2-135m)")
    parser.add_argument("--pairs", type=int, default=40, help="an even number; 0 leaves them out")
    arguments = parser.parse_args()
    missed = []
    print(f"model={arguments.model} {load()}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        setting = prepare(recipe_for(arguments.model, scratch, rounds=ROUNDS), Watch())
        bare(
            setting.model, setting.recipe.train, [c[:3] for c in round_batches(setting, 1)[:1]]
        )  # the first steps are slower
        whole, steps = one_run(setting, scratch / "run")
        print(f"parameters={sum(p.numel() for p in setting.model.causal_lm.parameters()):,}")
        print(f"step_ms={1e3 * steps / (CLIENTS * ROUNDS * STEPS):.1f}")
        print(f"overhead_ratio={whole / steps:.4f}", flush=True)
        missed += ["overhead_ratio"] if whole / steps > LIMIT else []
        if arguments.pairs:
            federation = {"rounds": arguments.pairs + 2, "clients_per_round": 1}
            setting = prepare(recipe_for(arguments.model, scratch, **federation), Watch(), models=setting.models)
            found = in_pairs(setting, scratch / "pairs")
            for name, one, other, least, most in (
                ("pair", "A", "B", 0.0, LIMIT), ("same", "C", "B", 0.99, 1.01), ("busy", "D", "C", 1.01, 1.03),
            ):  # fmt: skip
                value = ratio(found[one], found[other])
                print(f"{name}_ratio={value:.4f}", f"{name}_error={spread(found[one], found[other]):.4f}", sep="\n")
                missed += [] if least <= value <= most else [f"{name}_ratio"]
    print(load())
    for name in missed:
        print(f"missed: {name}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
