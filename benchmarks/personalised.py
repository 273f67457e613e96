"""Held-out loss on each client's own test data: personalised algorithms against `fedavg`, with the same local steps.

    python benchmarks/personalised.py                                   a random model of two layers: a minute
    python benchmarks/personalised.py --model smollm2-135m              the built-in model on fed-skills: half an hour
    python benchmarks/personalised.py --model smollm2-135m --only ditto fedper

One skill a client (fed-skills split by `meta`). Lines are `NAME.own_loss=` (the mean over clients of each one's loss on its
own test data, under the model that it ends with) and `NAME.ratio=` (that over fedavg's). All that the registry calls
personal are run; `local`, which shares nothing, stands beside them. The exit code is 1 where a ratio is not under 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedloom import run
from fedloom.common import registry
from fedloom.models.loading import quiet_transformers
from fedloom.recipe.recipe import Recipe

#: Options for this scenario where an algorithm's defaults are made for another.
OPTIONS: dict[str, dict[str, Any]] = {}


def recipe_for(model: str, name: str, scratch: Path) -> Recipe:
    values: dict[str, Any] = {
        "name": name,
        "algorithm": {"name": name, **OPTIONS.get(name, {})},
        "split": {"splitter": "meta"},
        "evaluation": {"suite": None, "answers": 0, "every": 0},
    }
    if model != "tiny":
        data = {"corpus": "fed-skills", "max_length": 128, "template": "plain", "limit": 640}
        train = {"steps": 8, "batch_size": 4, "lr": 2e-3, "schedule": "linear"}
        return Recipe.parse(values | {"model": model, "data": data, "train": train, "federation": {"rounds": 2}})
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.helpers import tiny

    with quiet_transformers():
        folder = tiny.save_model(scratch / "model")
    data = {"path": str(tiny.write_rows(scratch / "rows.jsonl")), "max_length": 96, "template": "plain"}
    train = {"steps": 8, "batch_size": 4, "lr": 5e-3}
    return Recipe.parse(values | {"model": str(folder), "data": data, "train": train, "federation": {"rounds": 4}})


def own_loss(recipe: Recipe) -> float:
    """The mean over clients of each one's loss on its own test data."""
    with tempfile.TemporaryDirectory() as scratch:
        clients = run(recipe, out=Path(scratch) / "run").summary["per_client"].values()
    losses = [c["loss"]["after"] for c in clients]
    return sum(losses) / len(losses)


def main() -> int:
    personal = [n for n in registry.algorithms.names() if registry.algorithms.get(n).properties.personal]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a model as in a recipe (smollm2-135m)")
    parser.add_argument("--only", nargs="+", default=personal, choices=personal, metavar="NAME")
    arguments = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        shared = own_loss(recipe_for(arguments.model, "fedavg", Path(scratch)))
        print(f"fedavg.own_loss={shared:.4f}", flush=True)
        for name in arguments.only:
            loss = own_loss(recipe_for(arguments.model, name, Path(scratch)))
            print(f"{name}.own_loss={loss:.4f}\n{name}.ratio={loss / shared:.4f}", flush=True)
            if not loss < shared and name != "local":
                wrong.append(name)
    if wrong:
        print(f"no better than fedavg: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
