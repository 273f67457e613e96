"""The real model, killed with SIGKILL at three random moments and resumed: the same bits, no finished round lost."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from fedloom.federation.record.events import read_events

pytestmark = [pytest.mark.slow, pytest.mark.network]

RECIPE = {
    "model.name": "smollm2-135m", "adapter.rank": 8, "train.steps": 2, "train.batch_size": 4, "train.lr": 1e-3,
    "train.optimizer_state": "keep", "train.schedule": "linear", "evaluation.every": 0, "evaluation.answers": 1,
}  # fmt: skip


def digest(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["adapter_sha256"]


def test_killed_at_three_random_moments(cli, recipe_file, smollm2, tmp_path):
    recipe = recipe_file(RECIPE)
    started = time.monotonic()
    assert cli("run", recipe, "--out", "undisturbed").code == 0
    seconds = time.monotonic() - started
    expected = digest(tmp_path / "undisturbed")
    draw = random.Random(135)
    for number in range(3):
        folder = tmp_path / f"run-{number}"
        process = cli.start("run", recipe, "--out", folder)
        delay = seconds * (0.15 + 0.75 * (number + draw.random()) / 3)
        time.sleep(delay)
        process.send(signal.SIGKILL)
        code = process.wait().code
        kept = max((int(p.name[6:]) for p in (folder / "checkpoints").glob("round-*")), default=0)
        print(f"killed after {delay:.1f} of {seconds:.1f} s (code {code}), {kept} rounds were finished")
        done = cli("run", recipe, "--out", folder, *(["--resume"] if (folder / "recipe.yaml").exists() else []))
        assert done.code == 0, done.err
        assert digest(folder) == expected
        events = read_events(folder / "events.jsonl")
        assert [e["round"] for e in events if e["event"] == "round_finished"] == [1, 2]
        lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        resumed = max((i for i, e in enumerate(lines) if e["event"] == "run_resumed"), default=0)
        assert not [e for e in lines[resumed:] if resumed and e["event"] == "round_started" and e["round"] <= kept]
