"""Disks that are full or cannot be written, for real: small tmpfs mounts. Exit code 1, one sentence, rounds kept."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.events import read_events
from tests.helpers.disks import mount, remount

RECIPE = {"federation.rounds": 3, "train.optimizer_state": "keep", "evaluation.answers": 1, "adapter.rank": 8}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; a test remounts it larger or read-only."""
    place = tmp_path / "disk"
    mount(place, "size=16m")
    yield place
    subprocess.run(["umount", place], check=True)


def digest(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["adapter_sha256"]


def used(folder: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*"))


WHOLE: dict[str, tuple[str, int]] = {}


@pytest.fixture
def whole(cli, recipe_file, tmp_path):
    """(recipe, hash, kilobytes that a run needs); it is run once."""
    recipe = recipe_file(RECIPE)
    if not WHOLE:
        done = cli("run", recipe, "--out", "whole")
        assert done.code == 0, done.err
        WHOLE["run"] = digest(tmp_path / "whole"), used(tmp_path / "whole") // 1024
    return recipe, *WHOLE["run"]


# Full at the start, in the first checkpoint, between rounds, while the result is written; the others by `make test-faults`.
@pytest.mark.parametrize(
    "share",
    [0.02, 0.25, 0.7, 0.97] + [pytest.param(share, marks=pytest.mark.faults) for share in (0.1, 0.4, 0.55, 0.8, 0.9)],
)
def test_a_full_disk_costs_no_finished_round(cli, whole, disk, share):
    recipe, expected, kilobytes = whole
    remount(disk, f"size={max(8, int(kilobytes * share))}k")
    done = cli("run", recipe, "--out", disk / "run")
    if done.code == 0:  # pruning leaves room at the end
        assert share > 0.9
        return
    assert done.code == 1, done.err
    sentence = done.sentence
    assert "No space left" in sentence
    checkpoints = Checkpoints(disk / "run" / "checkpoints")
    finished = checkpoints.newest()[0] if checkpoints.rounds() else None
    if finished is not None:
        assert f"{finished.round} finished rounds are kept in {disk / 'run'}" in sentence
    remount(disk, "size=64m")
    how = ["--resume"] if (disk / "run" / "recipe.yaml").exists() else []
    done = cli("run", recipe, "--out", disk / "run", *how)
    assert done.code == 0, done.err
    assert digest(disk / "run") == expected
    events = read_events(disk / "run" / "events.jsonl")
    assert [e["round"] for e in events if e["event"] == "round_finished"] == [1, 2, 3]
    if finished is not None:
        raw = [json.loads(line) for line in (disk / "run" / "events.jsonl").read_text().splitlines()]
        at = next(i for i, e in enumerate(raw) if e["event"] == "run_resumed")
        assert all(e["round"] > finished.round for e in raw[at:] if e["event"] == "round_started")


def test_a_disk_that_fills_up_while_the_result_is_written(cli, recipe_file, disk):
    """Another program takes the space that is left, just before peft writes adapter/."""
    recipe = recipe_file(RECIPE)
    setup = f"""
from fedloom.models.adapters import AdaptedModel
save = AdaptedModel.save
def late(self, *args):
    with open({str(disk / "other")!r}, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)): pass
        except OSError: pass
    save(self, *args)
AdaptedModel.save = late
"""
    done = cli("run", recipe, "--out", disk / "run", setup=setup)
    assert done.code == 1
    assert "3 finished rounds are kept" in done.sentence
    (disk / "other").unlink()
    done = cli("run", recipe, "--out", disk / "run", "--resume")
    assert done.code == 0, done.err
    assert cli("run", recipe, "--out", "elsewhere").code == 0
    assert digest(disk / "run") == digest(disk.parent / "elsewhere")


@pytest.mark.parametrize("options", ["size=4k", "ro"])
def test_a_cache_that_cannot_be_written_is_done_without(cli, recipe_file, disk, options):
    recipe = recipe_file()
    remount(disk, options)
    done = cli("run", recipe, "--out", "run", env={"FEDLOOM_HOME": str(disk)})
    assert done.code == 0, done.err
    assert [p for p in disk.rglob("*") if p.is_file()] == []


def test_a_read_only_disk(cli, recipe_file, disk):
    recipe = recipe_file()
    remount(disk, "ro")
    done = cli("run", recipe, "--out", disk / "run")
    assert done.code == 1
    assert "Read-only file system" in done.sentence


def test_a_disk_that_becomes_read_only_keeps_its_rounds(cli, recipe_file, disk):
    recipe = recipe_file(RECIPE)
    assert cli("run", recipe, "--out", disk / "run").code == 0
    expected = digest(disk / "run")
    remount(disk, "ro")
    done = cli("run", recipe, "--out", disk / "run", "--resume", "federation.rounds=4")
    assert done.code == 1
    assert "Read-only" in done.sentence
    remount(disk, "rw")
    assert digest(disk / "run") == expected
    assert Checkpoints(disk / "run" / "checkpoints").rounds() == [3, 2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(cli, recipe_file, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    done = cli("run", recipe_file(), "--out", tmp_path / "closed" / "run")
    assert done.code == 1
    assert "Permission denied" in done.sentence


def test_a_folder_below_a_file(cli, recipe_file, tmp_path):
    (tmp_path / "file").write_text("here first")
    done = cli("run", recipe_file(), "--out", tmp_path / "file" / "run")
    assert done.code == 1
    assert "Not a directory" in done.sentence
    assert (tmp_path / "file").read_text() == "here first"


def test_other_commands_on_a_full_disk(cli, recipe_file, disk, tmp_path):
    assert cli("run", recipe_file(), "--out", "run").code == 0
    remount(disk, "size=4k")
    for args in (
        ["report", "run", "--out", disk / "report.html"],
        ["export", "run", "--out", disk / "adapter"],
        ["export", "run", "--format", "merged", "--out", disk / "merged"],
        ["evaluate", "run", "--out", disk / "deep" / "numbers.json"],
        ["split", tmp_path / "tiny.yaml", "--out", disk / "split.svg"],
    ):
        (disk / "filler").write_bytes(b"")
        done = cli(*args, setup=f"open({str(disk / 'filler')!r}, 'wb').write(bytes(4096))")
        assert done.code == 1, (args, done.err)
        assert "No space left" in done.sentence
        assert {p.name for p in disk.iterdir() if p.is_dir()} <= {"deep"}, args
