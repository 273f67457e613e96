"""What a further client costs, in memory and on disk, and that ten thousand cost what ten do.

Each run is a process of its own, whose peak of resident memory its summary tells. All clients train in every round of the
first runs; of the last two ten are sampled in each, from 10 clients or from 10,000 over the same corpus. S is the model.

    python benchmarks/memory.py                    all of it, about two minutes
    python benchmarks/memory.py --clients 10 60    other numbers of clients to take the slope between

Prints, for plain SGD and for AdamW whose moments are kept: bytes_per_client_ratio= (memory of a further client over the
adapter's bytes), disk_per_client_ratio= (the same of what it leaves in the run folder), and then
population_10k_ratio=. The exit code is 1 where a further client takes more than 1.1 adapters (3.3 with moments), or 10,000
clients more than 1.1 times the memory of 10.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fedloom  # noqa: F401  isort: skip  sets what torch reads when it is imported
from small import equal_rows, recipe_values, small_model

RUN = "import json, sys; from fedloom import Recipe, run; run(Recipe.parse(*json.loads(sys.argv[1])), out=sys.argv[2])"

STATES = {
    "stateless": {"train.optimizer": "sgd"},
    "adam_moments": {"train.optimizer": "adamw", "train.optimizer_state": "keep", "federation.rounds": 2},
}

#: Adapters that a further client may take in memory.
LIMITS = {"stateless": 1.1, "adam_moments": 3.3}


def measured(out: Path, values: dict[str, Any], overrides: dict[str, Any]) -> tuple[int, int, int]:
    """(peak bytes of memory, the adapter's bytes, bytes of the clients' own files) of a run in a process of its own."""
    told = json.dumps([values, {"federation.rounds": 1, **overrides}])
    subprocess.run([sys.executable, "-c", RUN, told, str(out)], check=True, stderr=subprocess.DEVNULL)
    summary = json.loads((out / "summary.json").read_text())
    left = sum(p.stat().st_size for p in (out / "clients").rglob("*.safetensors"))
    return summary["cost"]["peak_memory_bytes"], summary["adapter"]["bytes"], left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs=2, default=[10, 60])
    parser.add_argument("--population", type=int, default=10_000)
    arguments = parser.parse_args()
    few, more = arguments.clients
    broken = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, rows = small_model(folder / "model"), equal_rows(folder / "rows.jsonl", more)
        for name, overrides in STATES.items():
            found = {n: measured(folder / f"{name}-{n}", recipe_values(model, rows, n), overrides) for n in (few, more)}
            adapter = found[more][1]
            print(f"{name}.adapter_bytes={adapter}")
            memory, disk = ((found[more][i] - found[few][i]) / (more - few) / adapter for i in (0, 2))
            print(f"{name}.bytes_per_client_ratio={memory:.3f}")
            broken += [f"{name}.bytes_per_client_ratio"] if memory > LIMITS[name] else []
            print(f"{name}.disk_per_client_ratio={disk:.3f}", flush=True)
        crowd = equal_rows(folder / "crowd.jsonl", 2 * arguments.population)
        sampled = {"federation.clients_per_round": 10, "federation.rounds": 3, "train.optimizer_state": "keep"}
        peaks = {
            n: measured(folder / f"crowd-{n}", recipe_values(model, crowd, n), sampled)[0]
            for n in (10, arguments.population)
        }
        for n, peak in peaks.items():
            print(f"population_{n}_peak_bytes={peak}")
        ratio = peaks[arguments.population] / peaks[10]
        print(f"population_10k_ratio={ratio:.3f}")
        broken += ["population_10k_ratio"] if ratio > 1.1 else []
    if broken:
        print(f"over its limit: {', '.join(broken)}", file=sys.stderr)
    return bool(broken)


if __name__ == "__main__":
    raise SystemExit(main())
