"""Interrupted runs: killed at random and at chosen moments, resumed, extended, and refused what would make them another."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from fedloom.federation.record.events import SCHEMA, read_events
from fedloom.federation.record.run_folder import continued, recipe_and_folder

#: Four clients' state matters here: moments kept between rounds, dropout, sampling, a falling rate.
RECIPE = {
    "train.optimizer_state": "keep", "adapter.dropout": 0.1, "federation.clients_per_round": 2, "federation.rounds": 3,
    "evaluation.answers": 2, "train.schedule": "cosine",
}  # fmt: skip


def digest(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["adapter_sha256"]


def raw_events(folder: Path) -> list[dict]:
    path = folder / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(p.name[6:]) for p in (folder / "checkpoints").glob("round-*"))


def temporary(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if p.name != ".lock"]


def assert_whole(folder: Path, rounds: int, expected: str) -> None:
    """As if nothing had happened: the same bits, every round and evaluation once, nothing left over."""
    assert digest(folder) == expected
    for event in raw_events(folder):
        assert set(event) == {"event", "time", *SCHEMA[event["event"]]}
    told = Counter((e["event"], e["round"]) for e in read_events(folder / "events.jsonl") if "round" in e)
    for round in range(1, rounds + 1):
        for kind in ("round_started", "round_finished", "evaluation"):
            assert told[kind, round] == 1, (kind, round)
        assert told["client_update", round] == 2, round
    assert told["evaluation", 0] == 1
    assert sum(1 for e in read_events(folder / "events.jsonl") if e["event"] in {"run_started", "run_finished"}) == 2
    assert temporary(folder) == []


def assert_no_round_twice(folder: Path, kept: int) -> None:
    """A round whose checkpoint was on disk when the process died was not run again."""
    events = raw_events(folder)
    at = max(i for i, e in enumerate(events) if e["event"] in {"run_resumed", "run_started"})
    again = [e["round"] for e in events[at:] if e["event"] == "round_started"]
    assert [r for r in again if r <= kept] == []


EXPECTED: dict[str, str] = {}


@pytest.fixture
def undisturbed(cli, recipe_file, tmp_path):
    """(recipe, hash) of a run that nothing disturbs; it is run once."""
    recipe = recipe_file(RECIPE)
    if not EXPECTED:
        assert cli("run", recipe, "--out", "undisturbed").code == 0
        EXPECTED["hash"] = digest(tmp_path / "undisturbed")
    return recipe, EXPECTED["hash"]


@pytest.mark.parametrize("moments", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(cli, undisturbed, tmp_path, moments):
    recipe, expected = undisturbed
    started = time.monotonic()
    assert cli("run", recipe, "--out", "timed").code == 0
    seconds = time.monotonic() - started
    draw = random.Random(2309)
    killed = 0
    for number in range(30):
        folder = tmp_path / f"run-{number}"
        process = cli.start("run", recipe, "--out", folder)
        time.sleep(seconds * (0.1 + 0.85 * (killed + draw.random()) / moments))
        process.send(signal.SIGKILL)
        if process.wait().code != -signal.SIGKILL:  # the machine is less busy than when the run was timed
            seconds *= 0.8
            continue
        killed += 1
        kept = max(checkpoints(folder), default=0)
        how = ["--resume"] if (folder / "recipe.yaml").exists() else []
        done = cli("run", recipe, "--out", folder, *how)
        assert done.code == 0, done.err
        assert_whole(folder, 3, expected)
        assert_no_round_twice(folder, kept)
        if killed == moments:
            break
    assert killed == moments


#: Moments that chance would rarely hit: right after an event was written.
KILL_AT_EVENT = """
import os, signal
from fedloom.federation.record.events import Events
write = Events.write
def dying(self, event, **fields):
    write(self, event, **fields)
    if event == {event!r} and fields.get("round", 2) == 2: os.kill(os.getpid(), signal.SIGKILL)
Events.write = dying
"""


@pytest.mark.parametrize(
    "kind", ["server.safetensors", "state.json", "round-0002", "amended", "client", "answers.json"]
)
@pytest.mark.parametrize("before", [True, False])
def test_killed_around_a_renaming(cli, undisturbed, tmp_path, kind, before):
    recipe, expected = undisturbed
    condition = {
        "server.safetensors": "target.endswith('server.safetensors') and 'round-0002' in target",
        "state.json": "target.endswith('state.json') and '.round-0002' in target",
        "round-0002": "target.endswith('round-0002')",
        "amended": "target.endswith('/round-0002/state.json')",
        "client": "target.endswith('.safetensors') and '/clients/' in target and 'round-0002' in target",
        "answers.json": "target.endswith('answers.json')",
    }[kind]
    setup = f"""
import os, signal
replace = os.replace
def dying(source, target):
    target = str(target)
    chosen = {condition}
    if chosen and {before}: os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if chosen: os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
"""
    assert cli("run", recipe, "--out", "run", setup=setup).code == -signal.SIGKILL
    kept = max(checkpoints(tmp_path / "run"), default=0)
    done = cli("run", recipe, "--out", "run", "--resume")
    assert done.code == 0, done.err
    assert_whole(tmp_path / "run", 3, expected)
    assert_no_round_twice(tmp_path / "run", kept)


@pytest.mark.parametrize("event", [e for e in SCHEMA if e not in {"run_resumed", "run_stopped", "client_failed"}])
def test_killed_after_an_event(cli, undisturbed, tmp_path, event):
    recipe, expected = undisturbed
    assert cli("run", recipe, "--out", "run", setup=KILL_AT_EVENT.format(event=event)).code == -signal.SIGKILL
    kept = max(checkpoints(tmp_path / "run"), default=0)
    done = cli("run", recipe, "--out", "run", "--resume")
    assert done.code == 0, done.err
    assert_whole(tmp_path / "run", 3, expected)
    assert_no_round_twice(tmp_path / "run", kept)


def test_a_broken_last_line_is_cut_and_the_run_goes_on(cli, undisturbed, tmp_path):
    recipe, expected = undisturbed
    cli("run", recipe, "--out", "run", setup=KILL_AT_EVENT.format(event="client_update"))
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"event": "client_update", "time": 17')
    assert read_events(tmp_path / "run" / "events.jsonl")
    done = cli("run", recipe, "--out", "run", "--resume")
    assert done.code == 0, done.err
    assert_whole(tmp_path / "run", 3, expected)


def test_killed_twice_and_killed_while_resuming(cli, undisturbed, tmp_path):
    recipe, expected = undisturbed
    first = KILL_AT_EVENT.format(event="client_update")
    assert cli("run", recipe, "--out", "run", setup=first).code == -signal.SIGKILL
    for event in ("run_resumed", "round_finished"):
        setup = KILL_AT_EVENT.format(event=event).replace('fields.get("round", 2) == 2', "True")
        assert cli("run", recipe, "--out", "run", "--resume", setup=setup).code == -signal.SIGKILL
    assert cli("run", recipe, "--out", "run", "--resume").code == 0
    assert_whole(tmp_path / "run", 3, expected)


def test_ctrl_c_ends_with_130_and_can_be_resumed(cli, undisturbed, tmp_path):
    recipe, expected = undisturbed
    setup = KILL_AT_EVENT.format(event="client_update").replace("SIGKILL", "SIGINT")
    done = cli("run", recipe, "--out", "run", setup=setup)
    assert done.code == 130
    assert done.sentence == "interrupted; finished rounds are kept, continue with --resume"
    assert cli("run", recipe, "--out", "run", "--resume").code == 0
    assert_whole(tmp_path / "run", 3, expected)


def test_a_run_is_resumed_by_its_folder_alone(cli, recipe_file, tmp_path):
    recipe = recipe_file()
    assert cli("run", recipe, "--out", "run").code == 0
    expected = digest(tmp_path / "run")
    recipe.unlink()
    (tmp_path / "run" / "summary.json").unlink()
    done = cli("run", "run", "--resume")
    assert done.code == 0, done.err
    assert digest(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("fedavg", {}), ("fedavg", {"train.optimizer_state": "keep"}), ("local", {"train.optimizer_state": "keep"}),
     ("local", {"federation.clients_per_round": 1}), ("global", {"train.optimizer_state": "keep"})],
)  # fmt: skip
def test_an_extended_run_equals_a_longer_one(cli, recipe_file, tmp_path, algorithm, more):
    recipe = recipe_file({"algorithm.name": algorithm, "train.schedule": "constant", "train.warmup": 0.0, **more})
    assert cli("run", recipe, "--out", "short").code == 0
    short = json.loads((tmp_path / "short" / "summary.json").read_text())
    done = cli("run", recipe, "--out", "short", "--resume", "federation.rounds=4")
    assert done.code == 0, done.err
    assert cli("run", recipe, "--out", "long", "federation.rounds=4").code == 0
    extended, long = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("short", "long"))
    assert extended["adapter_sha256"] == long["adapter_sha256"] != short["adapter_sha256"]
    assert extended["loss"] == long["loss"]
    assert extended["rounds"] == 4
    for key in ("train_tokens", "steps"):
        assert extended["cost"][key] == long["cost"][key]
    started = [e["round"] for e in raw_events(tmp_path / "short") if e["event"] == "round_started"]
    assert started == [1, 2, 3, 4]


def test_a_finished_run_resumed_as_it_is_does_nothing_again(cli, recipe_file, tmp_path):
    recipe = recipe_file()
    assert cli("run", recipe, "--out", "run").code == 0
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert cli("run", recipe, "--out", "run", "--resume").code == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert after["adapter_sha256"] == before["adapter_sha256"]
    assert after["cost"]["upload_bytes"] == before["cost"]["upload_bytes"]
    assert [e["round"] for e in raw_events(tmp_path / "run") if e["event"] == "round_started"] == [1, 2]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("federation.rounds=1", ["federation.rounds=1", "2 rounds are finished"]),
        ("train.lr=0.5", ["train.lr", "0.5", "--out"]),
        ("model=gpt2", ["model.name", "gpt2"]),
        ("seed=7", ["seed", "7"]),
        ("evaluation.limit=3", ["evaluation.limit", "3"]),  # before and after would count other questions
    ],
)
def test_a_continuation_that_would_be_another_run_is_refused(cli, recipe_file, tmp_path, override, words):
    recipe = recipe_file()
    assert cli("run", recipe, "--out", "run").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    done = cli("run", recipe, "--out", "run", "--resume", override)
    assert done.code == 2
    for word in words:
        assert word in done.sentence
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_what_may_change_on_resume_changes(cli, recipe_file, tmp_path):
    recipe = recipe_file()
    assert cli("run", recipe, "--out", "run").code == 0
    assert (
        cli("run", recipe, "--out", "run", "--resume", "federation.rounds=3", "tracking.keep_checkpoints=1").code == 0
    )
    assert checkpoints(tmp_path / "run") == [3]


def test_the_python_call_resumes_with_the_recipe_that_started_it(tiny_recipe, tmp_path):
    from fedloom import run

    whole = run(tiny_recipe({"federation.rounds": 3}), tmp_path / "whole")
    first = run(tiny_recipe({"train.schedule": "constant"}), tmp_path / "run")
    assert first.summary["rounds"] == 2
    recipe = tiny_recipe({"train.schedule": "constant", "federation.rounds": 3})
    longer = run(recipe, tmp_path / "run", resume=True)
    assert longer.summary["rounds"] == 3
    assert longer.summary["adapter_sha256"] != whole.summary["adapter_sha256"]  # another schedule
    (tmp_path / "run" / "summary.json").unlink()
    assert run(recipe, tmp_path / "run", resume=True).summary["adapter_sha256"] == longer.summary["adapter_sha256"]


def test_a_command_that_resumes_takes_the_recipe_as_it_was_settled(recipe_file, tiny_recipe, tmp_path):
    """Between sites `evaluation.answers` becomes 0 as a run begins; the file that it began with says 5 for ever."""
    given, folder = recipe_file({"evaluation.answers": 5}), tmp_path / "run"
    folder.mkdir()
    stored = tiny_recipe({"evaluation.answers": 0})
    (folder / "recipe.yaml").write_text(stored.to_yaml())
    chosen, place = recipe_and_folder(str(given), {"federation.rounds": 7}, folder, True)
    assert (chosen.evaluation.answers, chosen.federation.rounds, place) == (0, 7, folder)
    assert continued(stored, chosen).federation.rounds == 7
    assert recipe_and_folder(str(given), {}, folder, False)[0].evaluation.answers == 5
