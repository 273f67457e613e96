"""events.jsonl: whole lines, one schema, broken tails; and TensorBoard's files against it."""

from __future__ import annotations

import json
import re

import pytest

from fedloom import run
from fedloom.common.errors import UserError
from fedloom.federation.record.events import SCHEMA, Events, find_trackers, read_events
from tests.helpers import ROOT


def started(events: Events, round: int) -> None:
    events.write("round_started", round=round, clients=["a"])


def finished(events: Events, round: int) -> None:
    values = {"updates": 1, "failures": 0, "loss": 1.0, "upload_bytes": 1, "download_bytes": 1, "seconds": 0.1}
    events.write("round_finished", round=round, metrics={}, **values)


def evaluated(events: Events, round: int, loss: float) -> None:
    values = {
        "score": None,
        "questions": 0,
        "tokens": 5,
        "clients": {},
        "spread": None,
        "virtual_seconds": None,
        "seconds": 0.1,
        "pooled": False,
        "emulator": None,
        "preference": None,
    }
    events.write("evaluation", round=round, loss=loss, **values)


def begun(events: Events) -> None:
    events.write("run_started", name="", algorithm="", model="", corpus="", clients=1, rounds=3, parameters=1)


def test_every_event_is_one_line_with_its_own_fields(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    started(events, 1)
    events.write("checkpoint", round=1, path="line\nbreak")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [
        {"event", "time", *SCHEMA[e]} for e in ("round_started", "checkpoint")
    ]
    for fields in ({"round": 1}, {"round": 1, "path": "x", "more": 1}):
        with pytest.raises(ValueError, match="checkpoint takes"):
            events.write("checkpoint", **fields)
    with pytest.raises(KeyError):
        events.write("nonsense")
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


def test_numbers_that_are_not_finite_are_refused_before_a_byte_is_written(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    with pytest.raises(ValueError, match=r"nan|JSON"):
        evaluated(events, 0, float("nan"))
    assert not (tmp_path / "events.jsonl").exists()


def test_the_listener_hears_each_event(tmp_path):
    heard: list[dict] = []
    events = Events(tmp_path / "events.jsonl", heard.append)
    started(events, 1)
    finished(events, 1)
    assert heard == [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tail", ['{"event": "round_st', "{", '{"event": "round_started", "round": 2, "clients": ["ü'])
def test_a_broken_tail_is_passed_over_and_then_cut(tmp_path, tail):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    started(events, 1)
    whole = path.read_bytes()
    path.write_bytes(whole + tail.encode()[:-1])
    assert len(read_events(path)) == 1
    finished(Events(path), 1)
    assert path.read_bytes().startswith(whole)
    assert [e["event"] for e in read_events(path)] == ["round_started", "round_finished"]
    assert len(path.read_text().splitlines()) == 2


def test_a_file_that_is_one_broken_line_is_emptied(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "run_')
    assert read_events(path) == []
    Events(path)
    assert path.read_bytes() == b""


def test_what_a_resumed_run_did_again_counts_once(tmp_path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    begun(events)
    evaluated(events, 0, 5.0)
    for round in (1, 2):
        started(events, round)
        finished(events, round)
        evaluated(events, round, 5.0 - round)
    started(events, 3)
    events.write("run_resumed", round=1, rounds=3, note="")
    evaluated(events, 1, 4.5)  # killed before the evaluation of round 1 was in its checkpoint
    started(events, 2)
    finished(events, 2)
    told = [(e["event"], e.get("round")) for e in read_events(path)]
    assert told == [
        ("run_started", None), ("evaluation", 0), ("round_started", 1), ("round_finished", 1), ("run_resumed", 1),
        ("evaluation", 1), ("round_started", 2), ("round_finished", 2),
    ]  # fmt: skip
    assert next(e["loss"] for e in read_events(path) if (e["event"], e.get("round")) == ("evaluation", 1)) == 4.5


def test_an_extended_run_has_one_end(tmp_path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    begun(events)
    finished(events, 1)
    events.write("run_finished", rounds=1, adapter_sha256="a", seconds=1.0)
    events.write("run_resumed", round=1, rounds=2, note="")
    finished(events, 2)
    events.write("run_finished", rounds=2, adapter_sha256="b", seconds=2.0)
    assert [e["adapter_sha256"] for e in read_events(path) if e["event"] == "run_finished"] == ["b"]
    assert [e["round"] for e in read_events(path) if e["event"] == "round_finished"] == [1, 2]


def test_a_run_that_was_killed_before_anything_could_be_resumed_begins_once(tmp_path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    begun(events)
    evaluated(events, 0, 5.0)
    begun(events)
    assert [e["event"] for e in read_events(path)] == ["run_started"]


def test_the_docs_name_every_event_and_field():
    text = (ROOT / "docs" / "run-folder.md").read_text()
    for event, fields in SCHEMA.items():
        section = re.split(r"^#{2,3} ", text.split(f"### `{event}`\n", 1)[1], maxsplit=1, flags=re.M)[0]
        assert re.findall(r"^\| `(\w+)` \|", section, flags=re.M) == list(fields), event


def test_tensorboard_shows_the_events_numbers(tiny_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny_recipe({"tracking.trackers": ["tensorboard"], "federation.rounds": 3})
    folder = run(recipe, tmp_path / "run").folder
    written = list((folder / "trackers").rglob("events.out.tfevents*"))
    assert written
    scalars: dict[str, dict[int, float]] = {}
    for path in written:
        accumulator = EventAccumulator(str(path))
        accumulator.Reload()
        for tag in accumulator.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update({e.step: e.value for e in accumulator.Scalars(tag)})
    events = read_events(folder / "events.jsonl")
    rounds = [e for e in events if e["event"] == "round_finished"]
    evaluations = [e for e in events if e["event"] == "evaluation"]
    assert len(rounds) == 3
    assert len(evaluations) == 4
    for tag, told, key in (
        ("train/loss", rounds, "loss"),
        ("train/upload_bytes", rounds, "upload_bytes"),
        ("train/updates", rounds, "updates"),
        ("evaluation/loss", evaluations, "loss"),
    ):
        assert scalars[tag] == pytest.approx({e["round"]: e[key] for e in told}, rel=1e-6), tag
    assert scalars["train/distance_moved"] == pytest.approx(
        {e["round"]: e["metrics"]["distance_moved"] for e in rounds}
    )


def test_trackers_are_found_by_name():
    assert find_trackers([]) == []
    with pytest.raises(UserError, match="did you mean wandb"):
        find_trackers(["wandbb"])
