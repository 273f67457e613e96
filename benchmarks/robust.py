"""The loss that each robust rule ends with when one client in ten is hostile, against its own clean run.

    python benchmarks/robust.py                                a random model of two layers: a minute or two
    python benchmarks/robust.py --model smollm2-135m           the built-in model on fed-skills: an hour
    python benchmarks/robust.py --model smollm2-135m --rule krum

fed-skills is split uniformly among ten clients, of which the second is hostile in every round:

    noise   what it learned and a thousand standard normals on each number
    flip    the start minus what it learned
    nan     not a number

Lines are `RULE.clean=loss` and `RULE.ATTACK=loss/clean loss`, inf where nobody could train on; `fedavg` stands beside
them. The exit code is 1 where a rule ends over 1.1 of its clean loss, or where fedavg does not refuse the update that is
not a number and go on.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from fedloom.recipe.recipe import Recipe

import torch  # isort: skip

from fedloom import run
from fedloom.common import registry
from fedloom.common.errors import RunFailed
from fedloom.common.randomness import torch_generator
from fedloom.messages.types import Assignment, Outcome, Payload, Update
from fedloom.models.loading import quiet_transformers
from fedloom.runtimes.simulator import Simulator

RULES = ("median", "trimmed_mean", "krum", "geometric_median", "norm_bound")
ATTACKS = ("noise", "flip", "nan")


class Hostile(Simulator):
    """The simulator, with one client whose updates are altered on their way."""

    attack: ClassVar[str] = ""

    def run(self, assignments: Iterable[Assignment]) -> Iterator[Outcome]:
        for assignment in assignments:
            for outcome in super().run([assignment]):
                hostile = self.attack and outcome.client == self.clients[1] and isinstance(outcome, Update)
                if hostile and assignment.kind == "train":
                    outcome = self._altered(outcome, assignment.payload.tensors)
                yield outcome

    def _altered(self, update: Update, start: dict[str, torch.Tensor]) -> Update:
        rng = torch_generator(0, "noise", update.round, update.client)
        learned = update.payload.tensors
        tensors = {
            "noise": {n: t + 1e3 * torch.randn(t.shape, generator=rng) for n, t in learned.items()},
            "flip": {n: start[n] - (t - start[n]) for n, t in learned.items()},
            "nan": {n: torch.full_like(t, torch.nan) for n, t in learned.items()},
        }[self.attack]
        return replace(update, payload=Payload(tensors))


def recipe_for(model: str, rule: str, scratch: Path) -> Recipe:
    values: dict[str, Any] = {
        "name": "robust",
        "algorithm": rule,
        "split": {"splitter": "uniform", "num_clients": 10},
        "runtime": {"name": "hostile"},
        "evaluation": {"suite": None, "answers": 0, "every": 0},
    }
    if model != "tiny":
        data = {"corpus": "fed-skills", "max_length": 128, "template": "plain"}
        train = {"steps": 4, "batch_size": 4, "lr": 2e-3, "schedule": "linear"}
        return Recipe.parse(values | {"model": model, "data": data, "train": train, "federation": {"rounds": 3}})
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.helpers import tiny

    with quiet_transformers():
        folder = tiny.save_model(scratch / "model")
    data = {"path": str(tiny.write_rows(scratch / "rows.jsonl")), "max_length": 96, "template": "plain"}
    train = {"steps": 4, "batch_size": 4, "lr": 5e-3}
    return Recipe.parse(values | {"model": str(folder), "data": data, "train": train, "federation": {"rounds": 4}})


def ended(recipe: Recipe, attack: str) -> tuple[float, int]:
    """(the loss after the last round, or inf where the run broke down, failures)."""
    Hostile.attack = attack
    with tempfile.TemporaryDirectory() as scratch:
        try:
            summary = run(recipe, out=Path(scratch) / "run").summary
        except RunFailed:
            return math.inf, 0
    return summary["loss"]["after"], summary["failures"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a model as in a recipe (smollm2-135m)")
    parser.add_argument("--rule", nargs="+", default=[*RULES, "fedavg"], choices=[*RULES, "fedavg"])
    arguments = parser.parse_args()
    registry.runtimes.register("hostile", Hostile)
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        for rule in arguments.rule:
            recipe = recipe_for(arguments.model, rule, Path(scratch))
            clean, _ = ended(recipe, "")
            print(f"{rule}.clean={clean:.4f}", flush=True)
            for attack in ATTACKS:
                loss, failures = ended(recipe, attack)
                print(f"{rule}.{attack}={loss / clean:.4f}", flush=True)
                held = (
                    loss <= 1.1 * clean if rule != "fedavg" else attack != "nan" or failures == recipe.federation.rounds
                )
                if not held:
                    wrong.append(f"{rule}.{attack}")
    if wrong:
        print(f"not as it should be: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
