"""What offsite tuning loses as more of the model stays with the server: the recipe `fedot` at several drops, in one table.

    python benchmarks/offsite.py                       0, 20 and 50 % of the middle's layers dropped: 20 CPU minutes
    python benchmarks/offsite.py --drops 0.2           one of them
    python benchmarks/offsite.py train.steps=1 …       any key of the recipe changed

Lines are `drop.number=loss` for the five numbers, and `drop.share_of_parameters=share` for what left the server. Held-out
loss of all clients together; runs lie in --out, so that `fedloom report OUT/*` shows them on one page, and a run that is
there is carried on. The full model's own tuning is the run with nothing dropped, so it is not done again. The exit code is
1 where 20 % does not end below the full zero-shot and the emulator's own loss.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedloom.experiment.run import run
from fedloom.federation.record.run_folder import RunFolder
from fedloom.federation.watch import Watch
from fedloom.recipe.overrides import parse_overrides
from fedloom.recipe.recipe import Recipe

NUMBERS = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drops", default="0,0.2,0.5", help="shares of the middle's layers, with commas")
    parser.add_argument("--out", default="runs/offsite", help="folder of the runs")
    parser.add_argument("overrides", nargs="*", help="key=value, as for `fedloom run fedot`")
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for drop in sorted({float(d) for d in arguments.drops.split(",")}):
        values = {"algorithm.drop": drop, "algorithm.reference": False, "name": f"fedot-{drop:g}"}
        recipe = Recipe.load("fedot", {**values, **parse_overrides(arguments.overrides)})
        folder = Path(arguments.out) / f"drop-{drop:g}"
        again = RunFolder(folder).holds_a_run
        watch = Watch(say=lambda text: print(text, file=sys.stderr, flush=True))
        offsite = run(recipe, folder, resume=again, watch=watch).summary["offsite"]
        losses = {n: offsite[n]["loss"] for n in NUMBERS if offsite[n] is not None}
        found[f"{drop:g}"] = {**losses, "share_of_parameters": offsite["left_server"]["share_of_parameters"]}
    untouched = found.get("0")
    for drop_name, numbers in found.items():
        if untouched is not None:
            numbers["full_tuned"] = untouched["plug_in"]
        for name, value in numbers.items():
            print(f"{drop_name}.{name}={value:.4f}", flush=True)
    fifth = found.get("0.2")
    if fifth is None:
        return 0
    return int(not fifth["plug_in"] < min(fifth["full_zero_shot"], fifth["emulator_zero_shot"]))


if __name__ == "__main__":
    sys.exit(main())
