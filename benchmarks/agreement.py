"""fedloom's numbers of public benchmarks against those of lm-eval's own command line: the same model, files and questions.

    FEDLOOM_DATA=FOLDER python benchmarks/agreement.py --limit 50

Each suite is measured twice, by `fedloom evaluate MODEL --suite NAME --limit N` and by `python -m lm_eval run` with
`--include_path` on our task files. Every number of every task has to be equal, digit for digit; `SUITE.equal=yes` says so,
and the script ends with 1 where one is not. --limit is the first N questions of each task: mmlu is one task, in which
the subjects take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SUITES = ("gsm8k", "humaneval", "mmlu", "helm-mini")


def run(command: list[str]) -> float:
    """Seconds that it took."""
    before = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return time.monotonic() - before


def theirs(lines: list[list[str]], model: str, left_out: list[str], place: Path) -> dict[str, dict[str, float]]:
    """{task: {measure: value}} of lm-eval's command line."""
    found: dict[str, dict[str, float]] = {}
    for number, line in enumerate(lines):
        at = line.index("--tasks") + 1
        tasks = [name for name in line[at].split(",") if name not in left_out]
        if not tasks:
            continue
        line = [part.replace("MODEL_FOLDER", model) for part in line]
        line[at] = ",".join(tasks)
        run([sys.executable, *line, "--device", "cpu", "--output_path", str(place / str(number))])
        for path in (place / str(number)).rglob("results_*.json"):
            for task, numbers in json.loads(path.read_text(encoding="utf-8"))["results"].items():
                found[task] = {
                    name.partition(",")[0]: value
                    for name, value in numbers.items()
                    if "," in name and "stderr" not in name
                }
    return found


def compare(suite: str, target: str, folder: str, limit: int, batch_size: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="agreement-") as name:
        place = Path(name)
        command = [sys.executable, "-m", "fedloom", "evaluate", target, "--suite", suite, "--limit", str(limit)]
        seconds = run([*command, "--set", f"evaluation.batch_size={batch_size}", "--out", str(place / "ours.json")])
        ours: dict[str, Any] = json.loads((place / "ours.json").read_text(encoding="utf-8"))
        before = time.monotonic()
        found = theirs(ours["command"], folder, list(ours["left_out"]), place)
        other = time.monotonic() - before
    equal = set(found) == set(ours["tasks"])
    for task, values in ours["tasks"].items():
        same = values["metrics"] == found.get(task)
        equal &= same
        print(
            f"  {task}: {values['metrics']} {'=' if same else '≠'} {found.get(task)} ({values['questions']} questions)"
        )
    for task, why in ours["left_out"].items():
        print(f"  {task}: left out, {why[:120]}")
    print(f"{suite}.score={ours['score']:.4f} {suite}.seconds={seconds:.0f} {suite}.command_line_seconds={other:.0f}")
    print(f"{suite}.equal={'yes' if equal else 'no'}", flush=True)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a built-in model, or a folder")
    parser.add_argument("--suites", nargs="+", default=list(SUITES))
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    asked = parser.parse_args()
    from fedloom.models.loading import locate
    from fedloom.recipe.recipe import ModelConfig

    folder, _ = locate(ModelConfig(name=asked.model))
    results = [compare(suite, asked.model, folder, asked.limit, asked.batch_size) for suite in asked.suites]
    raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
