"""State that was truncated or altered on disk: the round before is used and said, or the work ends with one sentence."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from fedloom.federation.record.events import read_events

RECIPE = {"federation.rounds": 3, "train.optimizer_state": "keep"}
DIE_AFTER_ROUND_2 = """
import os, signal
from fedloom.federation.record.events import Events
write = Events.write
def dying(self, event, **fields):
    if event == "round_started" and fields["round"] == 3: os.kill(os.getpid(), signal.SIGKILL)
    write(self, event, **fields)
Events.write = dying
"""
EXPECTED: dict[str, str] = {}


def digest(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["adapter_sha256"]


@pytest.fixture
def killed(cli, recipe_file, tmp_path):
    """A run that was killed as round 3 of 3 began."""
    recipe = recipe_file(RECIPE)
    if not EXPECTED:
        assert cli("run", recipe, "--out", "whole").code == 0
        EXPECTED["hash"] = digest(tmp_path / "whole")
    assert cli("run", recipe, "--out", "run", setup=DIE_AFTER_ROUND_2).code == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["round-0001", "round-0002"]
    return tmp_path / "run"


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit in the middle, which leaves the length and the format as they were."""
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(bytes(data))


def alter_number(path: Path) -> None:
    """A digit of a number: still JSON, and of the right shape."""
    text = path.read_text()
    at = text.index('"train_tokens": ') + len('"train_tokens": ')
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def other_round(path: Path) -> None:
    path.write_text(path.read_text().replace('"round": 2', '"round": 3'))


def not_an_object(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize(
    ("name", "damage"),
    [("server.safetensors", truncate), ("state.json", other_round), ("state.json", Path.unlink)]
    + [
        pytest.param(name, d, marks=pytest.mark.faults)  # the others by `make test-faults` alone
        for name, damages in {
            "server.safetensors": (empty, flip, Path.unlink),
            "state.json": (truncate, empty, alter_number, not_an_object),
        }.items()
        for d in damages
    ],
)
def test_the_round_before_a_damaged_checkpoint_is_used_and_said(cli, killed, name, damage):
    damage(killed / "checkpoints" / "round-0002" / name)
    done = cli("run", "run", "--resume")
    assert done.code == 0, done.err
    assert "checkpoint of round 2 is damaged" in done.err
    assert "using the one before it" in done.err
    resumed = [e for e in read_events(killed / "events.jsonl") if e["event"] == "run_resumed"]
    assert len(resumed) == 1
    assert resumed[0]["round"] == 1
    assert "checkpoint of round 2 is damaged" in resumed[0]["note"]
    assert digest(killed) == EXPECTED["hash"]
    finished = [e["round"] for e in read_events(killed / "events.jsonl") if e["event"] == "round_finished"]
    assert finished == [1, 2, 3]


def test_a_sound_checkpoint_is_used_without_a_word(cli, killed):
    done = cli("run", "run", "--resume")
    assert "damaged" not in done.err
    assert [e["note"] for e in read_events(killed / "events.jsonl") if e["event"] == "run_resumed"] == [""]
    assert digest(killed) == EXPECTED["hash"]


def test_with_no_whole_checkpoint_the_run_ends_with_one_sentence_and_keeps_what_there_is(cli, killed):
    for folder in (killed / "checkpoints").iterdir():
        truncate(folder / "server.safetensors")
    before = {p: p.read_bytes() for p in killed.rglob("*") if p.is_file()}
    done = cli("run", "run", "--resume")
    assert done.code == 1
    assert "no checkpoint" in done.sentence
    assert "--overwrite" in done.sentence
    assert {p: p.read_bytes() for p in killed.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_damaged_client_state_is_a_failure_and_not_a_fresh_start(cli, killed, damage):
    damage(killed / "clients" / "copy" / "round-0002.safetensors")
    done = cli("run", "run", "--resume")
    assert done.code == 0, done.err
    events = read_events(killed / "events.jsonl")
    failed = [e for e in events if e["event"] == "client_failed"]
    assert ("train", 3, "copy", "damaged_state") in {(e["kind"], e["round"], e["client"], e["reason"]) for e in failed}
    updates = [e["client"] for e in events if e["event"] == "client_update" and e["round"] == 3]
    assert updates == ["last", "upper"]
    assert "client copy failed" in done.err
    assert digest(killed) != EXPECTED["hash"]


def test_a_damaged_recipe_is_said(cli, killed):
    (killed / "recipe.yaml").write_text("model: [")
    done = cli("run", "run", "--resume")
    assert done.code == 2
    assert "recipe.yaml" in done.sentence


def test_a_damaged_answers_file_is_asked_again(cli, killed):
    truncate(killed / "answers.json")
    assert cli("run", "run", "--resume").code == 0
    assert digest(killed) == EXPECTED["hash"]
