"""What `fedkseed` sends and what it learns: bytes a message, and the fall of the held-out loss in 60 steps.

    python benchmarks/low_traffic.py                        a random model of two layers: seconds
    python benchmarks/low_traffic.py --model smollm2-135m   the built-in model on fed-gsm-symbolic: half an hour

The learning rate is chosen on the clients' validation data, from the rates given, after the first quarter of the steps;
the loss that is reported is that of their test data. Lines are `name=value`:

    validation.RATE           the pooled validation loss after the first quarter of the steps at that rate
    lr                        the rate chosen
    loss_before, loss_after   the pooled test loss
    loss_fall                 their difference over the first
    upload_bytes, download_bytes
                              the largest encoded message of any client in any round of training

The exit code is 1 where a message reaches 20,000 bytes or the loss falls by less than 1 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedloom.evaluation.loss import loss_sums
from fedloom.experiment.assemble import assemble
from fedloom.experiment.prepare import prepare
from fedloom.federation.record.events import read_events
from fedloom.federation.record.run_folder import opened
from fedloom.federation.results import deploy
from fedloom.federation.watch import Watch
from fedloom.models.loading import quiet_transformers
from fedloom.recipe.recipe import Recipe

STEPS, ROUNDS = 60, 4
LIMIT_BYTES, LIMIT_FALL = 20_000, 0.01


def recipe_for(model: str, lr: float, scratch: Path) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "low-traffic",
        "algorithm": "fedkseed",
        "train": {"steps": STEPS // ROUNDS, "batch_size": 4, "lr": lr, "schedule": "constant"},
        "federation": {"rounds": ROUNDS},
        "evaluation": {"suite": None, "answers": 0, "every": 0},
    }
    if model != "tiny":
        data = {"corpus": "fed-gsm-symbolic", "max_length": 256, "limit": 450}
        return values | {"model": model, "data": data, "split": {"splitter": "uniform", "num_clients": 3}}
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.helpers import tiny

    with quiet_transformers():
        folder = tiny.save_model(scratch / "model")
    rows = tiny.write_rows(scratch / "rows.jsonl")
    data = {"path": str(rows), "max_length": 96, "template": "plain"}
    return values | {"model": str(folder), "data": data, "split": {"splitter": "uniform", "num_clients": 3}}


def measure(values: dict[str, Any], rounds: int) -> dict[str, float]:
    """The first `rounds` rounds of a recipe: losses, and the largest messages."""
    setting = prepare(Recipe.parse(values, {"federation.rounds": rounds}), Watch())
    with (
        tempfile.TemporaryDirectory() as scratch,
        opened(Path(scratch) / "run", resume=False, overwrite=False) as folder,
    ):
        coordinator = assemble(setting, folder, False, Watch())
        progress = coordinator.run()
        coordinator.events.close()
        updates = [e for e in read_events(folder / "events.jsonl") if e["event"] == "client_update"]
        deploy(setting.model, setting.algorithm.deployed())
        clients = [setting.data.client(c) for c in setting.found.clients.clients]
        indices = [i for client in clients for i in client.validation]
        packed = setting.recipe.train.packing == "on"
        loss, tokens = loss_sums(setting.model, setting.data.sequences, indices, batch_size=24, packed=packed)
        coordinator.close()
    return {
        "validation": loss / tokens if math.isfinite(loss) else math.inf,
        "before": progress.evaluations[0].loss,
        "after": progress.evaluations[rounds].loss,
        "upload_bytes": max(e["upload_bytes"] for e in updates),
        "download_bytes": max(e["download_bytes"] for e in updates),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a model as in a recipe (smollm2-135m)")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2], help="rates to choose from")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipes = {lr: recipe_for(arguments.model, lr, Path(scratch)) for lr in arguments.lr}
        validation = {}
        for lr, values in recipes.items():
            validation[lr] = measure(values, 1)["validation"] if len(recipes) > 1 else math.nan
            print(f"validation.{lr:g}={validation[lr]:.5f}", flush=True)
        best = min(validation, key=lambda lr: validation[lr])
        found = measure(recipes[best], ROUNDS)
    fall = 1 - found["after"] / found["before"]
    print(f"lr={best:g}\nloss_before={found['before']:.5f}\nloss_after={found['after']:.5f}\nloss_fall={fall:.5f}")
    print(f"upload_bytes={found['upload_bytes']:.0f}\ndownload_bytes={found['download_bytes']:.0f}")
    most = max(found["upload_bytes"], found["download_bytes"])
    if most >= LIMIT_BYTES or fall < LIMIT_FALL:
        print(f"not as it should be: {most:.0f} bytes, a fall of {fall:.2%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
