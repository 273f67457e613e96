"""What a round costs in the Ray runtime over the simulator, and what more actors give back; side by side in one process.

Eight clients take one step each on a model of a few thousand weights, so that a round is all overhead; `--adapter large`
fine-tunes 2.1 million weights, 8.6 MB each way for each client. The runtimes take turns, and a round's seconds are the
median of what its events say. Adapters have to be equal, bit for bit.

    python benchmarks/ray_rounds.py                   both sizes, 1 and 2 actors
    python benchmarks/ray_rounds.py --adapter large --rounds 8 --actors 1 2 4

Prints NAME.RUNTIME_round_seconds=, NAME.RUNTIME_over_simulator= (the ratio) and NAME.RUNTIME_start_seconds= (from the first
line of code to the first round, Ray's own start in the first of them). Exits with 1 where an adapter differs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import fedloom  # sets what torch reads when it is imported
from fedloom import Recipe, run
from fedloom.federation.record.events import read_events
from fedloom.models.loading import quiet_transformers

SHAPES = {
    "small": {},
    "large": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5},
}


def recipe_for(size: str, rounds: int, scratch: Path) -> Recipe:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.helpers import tiny

    with quiet_transformers():
        folder = tiny.save_model(scratch / size, tiny.causal_lm(**SHAPES[size]))
    data = {"path": str(tiny.write_rows(scratch / "rows.jsonl")), "max_length": 96, "template": "plain"}
    return Recipe.parse(
        {
            "model": str(folder),
            "data": data,
            "split": {"splitter": "uniform", "num_clients": 8, "test": 0.2},
            "adapter": {"rank": 2, "alpha": 4} if size == "small" else {"method": "full"},
            "train": {"steps": 1, "batch_size": 1, "lr": 1e-3},
            "federation": {"rounds": rounds},
            "evaluation": {"suite": None, "answers": 0, "every": 0},
            "runtime": {"threads": 1, "device": "cpu"},
        }
    )


def timed(recipe: Recipe, out: Path) -> tuple[list[float], float, str, float]:
    """(seconds of each round but the first, seconds before it, the adapter's hash, bytes a client is sent)."""
    began = time.time()
    told: list[float] = []

    def note(event: dict) -> None:
        if event["event"] == "round_started" and not told:
            told.append(time.time() - began)

    result = run(recipe, out=out, watch=fedloom.federation.watch.Watch(event=note))
    finished = [e for e in read_events(out / "events.jsonl") if e["event"] == "round_finished"]
    sent = finished[-1]["download_bytes"] / finished[-1]["updates"]
    return [e["seconds"] for e in finished[1:]], told[0], result.summary["adapter_sha256"], sent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", nargs="+", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        for size in arguments.adapter:
            recipe = recipe_for(size, arguments.rounds, Path(scratch))
            ways = {"simulator": recipe}
            for actors in arguments.actors:
                ways[f"ray{actors}"] = recipe.with_values({"runtime.name": "ray", "runtime.ray.actors": actors})
            rounds: dict[str, list[float]] = {name: [] for name in ways}
            hashes: set[str] = set()
            for turn in range(arguments.turns):
                for name, how in ways.items():
                    seconds, start, digest, sent = timed(how, Path(scratch) / f"{size}-{name}-{turn}")
                    rounds[name] += seconds
                    hashes.add(digest)
                    print(f"{size}.{name}_start_seconds={start:.2f} (turn {turn + 1})", flush=True)
            print(f"{size}.bytes_down_each_client={sent:.0f}")
            base = statistics.median(rounds["simulator"])
            for name, seconds in rounds.items():
                middle = statistics.median(seconds)
                print(f"{size}.{name}_round_seconds={middle:.4f}")
                print(f"{size}.{name}_over_simulator={middle / base:.2f}", flush=True)
            different += len(hashes) > 1
    print(f"different_adapters={different}")
    return int(different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
