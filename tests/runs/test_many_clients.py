"""Two thousand clients, ten of them in a round: who is measured, how large the files are, and what a round costs."""

from __future__ import annotations

import csv
import json
from statistics import median

import pytest

from fedloom import run
from fedloom.common.errors import UserError
from fedloom.experiment.prepare import prepare
from fedloom.federation.record.client_table import MANY, ClientTable, quantile, spread
from fedloom.federation.record.events import read_events
from fedloom.federation.watch import Watch
from tests.helpers import tiny

CROWD = {
    "split.splitter": "uniform", "split.num_clients": 2000, "split.test": 0.4, "split.validation": 0.0,
    "federation.clients_per_round": 10, "federation.rounds": 3, "train.steps": 1, "train.batch_size": 1,
    "evaluation.every": 0, "evaluation.clients": MANY + 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return str(tiny.write_rows(tmp_path_factory.mktemp("crowd") / "rows.jsonl", 4000))


def test_a_crowd_leaves_files_that_stay_small_and_say_everything(tiny_recipe, rows, tmp_path):
    done = run(tiny_recipe({**CROWD, "data.path": rows}), out=tmp_path / "run")
    folder, events = done.folder, read_events(done.folder / "events.jsonl")
    assert max(map(len, (folder / "events.jsonl").read_text().splitlines())) < 2000
    assert sum(e["event"] == "client_update" for e in events) == 30
    state = json.loads((folder / "checkpoints" / "round-0003" / "state.json").read_text())
    assert len(json.dumps(state)) < 5000

    first, last = (e for e in events if e["event"] == "evaluation")
    assert first["clients"] == last["clients"] == {}
    tables = ClientTable(folder / "evaluations")
    before, after = tables.clients(0, first), tables.clients(3, last)
    assert list(before) == list(after) and len(after) == MANY + 1
    for event, clients in ((first, before), (last, after)):
        assert event["spread"] == spread(clients)
        tokens = sum(c["tokens"] for c in clients.values())
        assert event["loss"] == pytest.approx(sum(c["loss"] * c["tokens"] for c in clients.values()) / tokens)
        losses = sorted(c["loss"] for c in clients.values())
        assert event["spread"]["loss"]["median"] == median(losses)
        assert (event["spread"]["loss"]["lowest"], event["spread"]["loss"]["highest"]) == (losses[0], losses[-1])

    named = done.summary["per_client"]
    assert len(named) == MANY
    assert {n: c["loss"] for n, c in named.items()} == {
        n: {"before": before[n]["loss"], "after": after[n]["loss"]} for n in named
    }
    assert sorted(c["loss"]["after"] for c in named.values()) == sorted(c["loss"] for c in after.values())[-MANY:]
    worst = done.summary["loss"]["worst_client"]
    assert worst["client"] == max(after, key=lambda n: after[n]["loss"])
    assert worst["before"] == before[worst["client"]]["loss"]
    split = (folder / "split.json").read_text()
    assert len(split.splitlines()) < 2000 + 20
    assert [c["client"] for c in json.loads(split)["clients"]][-1] == "client-2000"
    page = done.report.read_text()
    assert "clients are measured, the same ones every time" in page and "Virtual time" not in page
    assert "lowest client to highest client" in page and "tables in evaluations/" in page


def test_the_same_clients_are_measured_every_time_and_their_number_changes_no_training(tiny_recipe, rows, tmp_path):
    few = {**CROWD, "data.path": rows, "split.num_clients": 40, "federation.rounds": 2, "evaluation.clients": 5}
    done = {n: run(tiny_recipe({**few, "evaluation.clients": n}), out=tmp_path / str(n)) for n in (5, 0.1, None)}
    measured = {
        n: [list(e["clients"]) for e in read_events(r.folder / "events.jsonl") if e["event"] == "evaluation"]
        for n, r in done.items()
    }
    assert measured[5][0] == measured[5][1] and len(measured[5][0]) == 5
    assert len(measured[0.1][0]) == 4 and len(measured[None][0]) == 40
    assert len({r.summary["adapter_sha256"] for r in done.values()}) == 1
    other = prepare(tiny_recipe({**few, "seed": 7}), Watch()).schedule.measuring
    assert list(other) != measured[5][0] and len(other) == 5


def test_asking_for_more_clients_than_hold_test_data_is_refused(tiny_recipe):
    with pytest.raises(UserError, match=r"evaluation\.clients=9 but only 3 clients hold test data"):
        prepare(tiny_recipe({"evaluation.clients": 9}), Watch())
    with pytest.raises(UserError, match="neither a whole number nor a fraction"):
        tiny_recipe({"evaluation.clients": 2.5})


def test_a_table_keeps_every_bit_and_what_was_not_measured(tmp_path):
    clients = {
        f"c,{i}\n": {"loss": 0.1 + i / 3, "tokens": i, "score": None if i % 2 else i / 7, "questions": i % 2}
        for i in range(MANY + 1)
    }
    tables = ClientTable(tmp_path)
    told = tables.told(3, clients)
    assert tables.clients(3, told) == clients
    assert told["spread"]["score"]["highest"] == 200 / 7
    with tables.path(3).open(newline="") as file:
        assert next(csv.reader(file)) == ["client", "loss", "tokens", "score", "questions"]
    few = dict(list(clients.items())[:MANY])
    assert tables.told(4, few) == {"clients": few, "spread": None}
    assert not tables.path(4).exists()
    assert [quantile([1.0, 2.0, 4.0], q) for q in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 4.0]
