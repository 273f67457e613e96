"""`fedloom benchmark zoo --size smoke`, killed with SIGKILL at five random moments and called again: the same table."""

from __future__ import annotations

import csv
import random
import signal
import time
from pathlib import Path

import pytest

from fedloom.common import registry
from fedloom.experiment.benchmark.columns import MEASURED
from fedloom.experiment.benchmark.declaration import Benchmark

pytestmark = [pytest.mark.slow]

#: Seconds of one whole matrix on two cores. A resumed one adds to it what was under way at each kill.
LIMIT = 15 * 60


def table(folder: Path) -> list[dict[str, str]]:
    """The columns that follow from the recipes, row by row; times, memory and the length of messages do not."""
    kept = {"algorithm", "seeds", "chosen", "trouble", *(key for c in MEASURED for key in (c.key, f"{c.key}_std"))}
    rows = csv.DictReader((folder / "table.csv").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in row.items() if key in kept} for row in rows]


def test_the_zoo_killed_at_five_random_moments_gives_the_same_table(cli, tmp_path):
    command = ("benchmark", "zoo", "--size", "smoke", "--out")
    started = time.monotonic()
    assert cli(*command, "whole").code == 0
    seconds = time.monotonic() - started
    whole = table(tmp_path / "whole")
    names = [cell.place["algorithm"] for cell in Benchmark.load("zoo", "smoke").cells()]
    assert [row["algorithm"] for row in whole] == names
    assert set(names) <= set(registry.algorithms.names())
    assert not any(row["trouble"] for row in whole)
    draw, reached = random.Random(41), []
    for number in range(5):
        process = cli.start(*command, "killed")
        time.sleep(seconds * (0.08 + 0.1 * draw.random()))
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL, f"kill {number} came after the end"
        reached.append(len(list((tmp_path / "killed" / "cells").rglob("summary.json"))))
    assert cli(*command, "killed").code == 0
    assert table(tmp_path / "killed") == whole
    print(f"{seconds:.0f} s undisturbed; finished runs at the kills: {reached}")
    assert reached == sorted(reached)
    assert reached[-1] > reached[0], "what is finished is kept"
    assert seconds < LIMIT
