"""Clients on devices of their own: times in closed form, deadlines, who is there, who has room, ranks, kills, refusals."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom import run
from fedloom.common.errors import RunFailed, UserError
from fedloom.common.randomness import numpy_generator
from fedloom.experiment.prepare import prepare
from fedloom.federation.record.events import read_events
from fedloom.federation.rounds import synchronous
from fedloom.federation.rounds.devices import Fleet
from fedloom.federation.rounds.dispatcher import Dispatcher, Terms
from fedloom.federation.rounds.schedule import Sampling, Schedule
from fedloom.federation.rounds.synchronous import SynchronousRounds
from fedloom.federation.rounds.virtual_time import VirtualTime
from fedloom.federation.runtime import Capabilities
from fedloom.federation.watch import Watch
from fedloom.messages.at_rest import to_bytes
from fedloom.messages.types import Cost, Failure, Payload, Update
from fedloom.recipe.recipe import DevicesConfig, FederationConfig, Recipe
from fedloom.reporting import charts
from fedloom.reporting.formats import duration

CLIENTS = tuple(f"client-{k}" for k in range(1, 9))
TWO = {"split.splitter": "uniform", "split.num_clients": 2, "federation.rounds": 3}


def alike(**more):
    """Devices of which all are the same."""
    return {"speed": {"median": 1e6}, "download": {"median": 1000}, "upload": {"median": 500}, **more}


def events_of(folder, kind):
    return [e for e in read_events(folder / "events.jsonl") if e["event"] == kind]


def traced(path, *rows, columns="client,speed,download,upload"):
    path.write_text("\n".join([columns, *rows]) + "\n")
    return str(path)


# ------------------------------------------------------------------ times


def test_times_of_two_clients_by_hand(tiny_recipe, tmp_path):
    """down / download + operations / speed + up / upload; a round ends with its last client. Bytes are those of fp32 and, up,
    of 8 bits with a scale of 2 bytes for each block of 256."""
    trace = traced(tmp_path / "trace.csv", "client-1,2e6,1000,500", "client-2,5e5,4000,100")
    ops = {"operators": {"up": [{"name": "quantize", "bits": 8}]}}
    done = run(tiny_recipe({**TWO, **ops, "devices": alike(trace=trace)}), out=tmp_path / "run")
    size = done.summary["adapter"]["bytes"]
    up = size / 4 + 2 * math.ceil(size / 4 / 256)
    updates = events_of(done.folder, "client_update")
    assert len(updates) == 6
    spent = done.summary["cost"]["train_flops"]
    ends, began, total = [], 0.0, 0.0
    for r in (1, 2, 3):
        own = {u["client"]: u["arrived"] - began for u in updates if u["round"] == r}
        flops_1 = 2e6 * (own["client-1"] - size / 1000 - up / 500)
        flops_2 = 5e5 * (own["client-2"] - size / 4000 - up / 100)
        total += flops_1 + flops_2
        began += max(own.values())
        ends.append(began)
    assert total == pytest.approx(spent, rel=1e-3)  # the times of events are rounded to a millisecond
    finished = [e["metrics"]["virtual_seconds"] for e in events_of(done.folder, "round_finished")]
    assert finished == pytest.approx(ends, abs=2e-3)
    evaluated = [e["virtual_seconds"] for e in events_of(done.folder, "evaluation")]
    assert evaluated == [0.0, *finished]
    assert done.summary["virtual"]["seconds"] == finished[-1]
    losses = [e["loss"] for e in events_of(done.folder, "evaluation")]
    assert done.summary["virtual"]["loss"] == [list(pair) for pair in zip(evaluated, losses, strict=True)]
    chart = charts.virtual_chart(read_events(done.folder / "events.jsonl"))
    assert chart is not None and chart.across == "virtual seconds"
    assert chart.lines[0].points == tuple((round(s), loss) for s, loss in zip(evaluated, losses, strict=True))
    page = done.report.read_text()
    assert "over virtual seconds" in page and f"{duration(finished[-1])}</data> of virtual time" in page
    assert "clients are measured" not in page


def test_a_devices_time_is_a_sum_of_three_quotients():
    config = DevicesConfig.model_validate(alike())
    fleet = Fleet(config, CLIENTS, 1)
    assert fleet.seconds("client-1", Cost(train_flops=3_000_000, wall_seconds=9.0), 2000, 250) == 2.0 + 3.0 + 0.5


def test_devices_that_are_alike_and_always_there_change_nothing(tiny_recipe, tmp_path):
    values = {"split.splitter": "uniform", "split.num_clients": 6, "federation.clients_per_round": 3}
    for name in ("fedavg", "fedbuff"):
        plain = run(tiny_recipe({**values, "algorithm": {"name": name}, "runtime.speed_spread": 0.0}), tmp_path / name)
        same = run(
            tiny_recipe({**values, "algorithm": {"name": name}, "devices": alike()}), tmp_path / f"{name}-devices"
        )
        keys = ("round", "client", "loss", "staleness")
        told = [[[e[k] for k in keys] for e in events_of(r.folder, "client_update")] for r in (plain, same)]
        if name == "fedavg":
            assert same.summary["adapter_sha256"] == plain.summary["adapter_sha256"]
            assert told[0] == told[1]
            assert plain.summary["virtual"] is None
        assert same.summary["virtual"]["seconds"] > 0


def test_slow_lines_make_fedbuffs_stragglers_stale(tiny_recipe, tmp_path):
    rows = [f"client-{k},1e9,1e9,{20 if k == 1 else 1e9}" for k in range(1, 6)]
    values = {
        "split.splitter": "uniform", "split.num_clients": 5, "algorithm": {"name": "fedbuff", "buffer": 2},
        "federation.rounds": 6, "evaluation.every": 0,
        "devices": alike(trace=traced(tmp_path / "trace.csv", *rows)),
    }  # fmt: skip
    done = run(tiny_recipe(values), out=tmp_path / "run")
    assert "client-1" not in {u["client"] for u in events_of(done.folder, "client_update")}
    synchronous = run(
        tiny_recipe({**values, "algorithm": {"name": "fedavg"}, "federation.rounds": 1}), tmp_path / "wait"
    )
    slowest = done.summary["adapter"]["bytes"] / 20
    assert done.summary["virtual"]["seconds"] < 1 < slowest < synchronous.summary["virtual"]["seconds"]


# ------------------------------------------------------------------ deadlines, being there, vanishing


def test_who_is_late_is_dropped_and_the_round_ends_with_the_deadline(tiny_recipe, tmp_path):
    trace = traced(tmp_path / "trace.csv", "client-2,1e3,1000,500")
    values = {**TWO, "federation.rounds": 2, "devices": alike(trace=trace, deadline=100.0)}
    done = run(tiny_recipe(values), out=tmp_path / "run")
    failed = events_of(done.folder, "client_failed")
    assert [(f["round"], f["client"], f["reason"]) for f in failed] == [(r, "client-2", "too_late") for r in (1, 2)]
    assert "virtual seconds, and devices.deadline is 100" in failed[0]["detail"]
    assert [e["metrics"]["virtual_seconds"] for e in events_of(done.folder, "round_finished")] == [100.0, 200.0]
    assert {u["client"] for u in events_of(done.folder, "client_update")} == {"client-1"}
    with pytest.raises(RunFailed, match="round 1 got 0 usable updates"):
        run(tiny_recipe({**values, "devices": alike(deadline=1e-6)}), out=tmp_path / "none")


class Exactly:
    """A pace with a deadline of 8 seconds and each client's seconds from a table."""

    deadline = 8.0

    def __init__(self, seconds):
        self.table = seconds

    def seconds(self, client, cost, down, up):
        return self.table[client]

    def vanishes(self, client, round, attempt):
        return client == "gone"


class Answering:
    """A virtual runtime whose clients answer at once; `refuses` fails."""

    capabilities = Capabilities(virtual=True)

    def run(self, assignments):
        for a in assignments:
            if a.client == "refuses":
                yield Failure(a.client, a.round, "test", "as asked", Cost(train_flops=9))
            else:
                yield Update(a.client, a.round, Payload({"w": torch.ones(2)}), num_examples=1)


def dispatcher(runtime: Any, pace: Any = None) -> Dispatcher:
    """Sends what says whether it is a client's first message."""
    algorithm: Any = SimpleNamespace(
        own_initial=False,
        initial_payload=lambda client: Payload(meta={"start": 1}),
        round_payload=lambda client: Payload(),
    )
    channel: Any = SimpleNamespace(encode=lambda assignment, own: assignment, decode=lambda outcome: outcome)
    terms, virtual = Terms({"name": "r"}, 9, 1, score=False), VirtualTime(pace) if pace else None
    return Dispatcher(algorithm, runtime, terms, channel, None, lambda *told: None, virtual)


def test_the_deadlines_edge_belongs_to_those_in_time_and_failures_take_none(tmp_path):
    table = {"edge": 8.0, "over": math.nextafter(8.0, 9.0), "quick": 2.0, "refuses": 5.0, "gone": 5.0}
    plan = Schedule(tuple(table), (), FederationConfig(), 1, 0, 0)
    source = SynchronousRounds(dispatcher(Answering(), Exactly(table)), plan, tmp_path)
    for number, ends in ((1, 8.0), (2, 16.0)):
        assert source.begin(number) == list(table)
        seen = {o.client: o for o in source.updates(lambda outcome: outcome)}
        assert {c for c, o in seen.items() if isinstance(o, Update)} == {"edge", "quick"}
        reasons = {c: o.reason for c, o in seen.items() if isinstance(o, Failure)}
        assert reasons == {"over": "too_late", "refuses": "test", "gone": "vanished"}
        assert [source.about(seen[c])["arrived"] for c in ("edge", "quick")] == [ends, ends - 6.0]
        assert source.now == ends
    resumed = SynchronousRounds(dispatcher(Answering(), Exactly(table)), plan, tmp_path)
    resumed.load(json.loads(json.dumps(source.notes())), {})
    assert resumed.now == 16.0


def test_of_those_that_vanish_only_a_round_below_quorum_waits(tmp_path, monkeypatch):
    """Above it, a failure is handed on at once, so that the updates behind it need not lie on disk."""
    table = {"gone": 1.0, "a": 1.0, "b": 1.0, "c": 1.0}
    written = []
    monkeypatch.setattr(synchronous, "to_bytes", lambda payload: written.append(1) or to_bytes(payload))
    for fewest, early in ((1, 0), (2, 1), (3, 2)):  # those that came below quorum wait behind the failure
        written.clear()
        plan = Schedule(tuple(table), (), FederationConfig(min_clients=fewest), 1, 0, 0)
        source = SynchronousRounds(dispatcher(Answering(), Exactly(table)), plan, tmp_path)
        source.begin(1)
        assert [o.client for o in source.updates(lambda outcome: outcome)] == list(table)
        assert len(written) == early


class Vanishing:
    """A runtime whose clients vanish `times` times and then answer, and say of their traffic what they like."""

    def __init__(self, times):
        self.left, self.told = Counter(times), []

    def run(self, assignments):
        for a in assignments:
            self.told.append((a.client, a.recipe is not None, bool(a.payload.meta)))
            cost = Cost(download_bytes=100, broadcast_bytes=-7)
            if self.left[a.client]:
                self.left[a.client] -= 1
                yield Failure(a.client, a.round, "vanished", "as asked")
            else:
                yield Update(a.client, a.round, Payload(), num_examples=1, cost=cost)


def test_a_client_that_no_message_reached_is_told_everything_when_it_is_asked_again():
    runtime = Vanishing({"a": 2})
    sending = dispatcher(runtime)
    first = []
    for asked in ("ab", "ab", "ab", "ab"):
        first.append([o.cost.broadcast_bytes for o in sending.outcomes("train", 1, asked)])
    assert [told for told in runtime.told if told[0] == "a"] == [("a", True, True)] * 3 + [("a", False, False)]
    assert [told[1] for told in runtime.told if told[0] == "b"] == [True, False, False, False]
    assert first == [[0, 100], [0, 0], [100, 0], [0, 0]]


def test_clients_are_there_as_often_as_they_are_said_to_be():
    clients = tuple(f"c{k}" for k in range(200))
    fleet = Fleet(DevicesConfig.model_validate({"available": 0.3, "dropout": 0.2}), clients, 5)
    federation = FederationConfig(clients_per_round=10)
    schedule = Schedule(clients, (), federation, 1, 0, 5, sampling=Sampling(there=fleet.there))
    there = [fleet.there(r) for r in range(1, 201)]
    assert np.mean([len(t) for t in there]) == pytest.approx(60, abs=1.5)
    assert len(set(there)) == 200
    for r, reachable in enumerate(there, 1):
        assert set(schedule.sample(r)) <= reachable and len(schedule.sample(r)) == 10
        assert set(schedule.queue(r)) == reachable
    often = Counter(c for t in there for c in t)
    assert min(often.values()) > 30 and max(often.values()) < 95
    lost = np.mean([fleet.vanishes(c, r) for c in clients[:50] for r in range(100)])
    assert lost == pytest.approx(0.2, abs=0.03)
    few = Schedule(
        clients[:3],
        (),
        FederationConfig(clients_per_round=3),
        1,
        0,
        5,
        sampling=Sampling(there=lambda *_: frozenset({"c1"})),
    )
    assert few.sample(1) == ("c1",)


def test_a_client_that_vanishes_is_sent_nothing_and_learns_nothing(tiny_recipe, tmp_path):
    trace = traced(tmp_path / "trace.csv", "client-1,1.0", columns="client,dropout")
    for name in ("fedavg", "fedbuff"):
        values = {**TWO, "algorithm": {"name": name}, "train.optimizer_state": "keep", "devices": alike(trace=trace)}
        done = run(tiny_recipe(values), out=tmp_path / name)
        assert {f["reason"] for f in events_of(done.folder, "client_failed")} == {"vanished"}
        assert {u["client"] for u in events_of(done.folder, "client_update")} == {"client-2"}
        assert [p.name for p in (done.folder / "clients").iterdir()] == ["client-2"]


@pytest.mark.parametrize("name", ["fedavg", "fedbuff"])
@pytest.mark.parametrize("chances", [{"available": 0.1}, {"dropout": 0.9}], ids=str)
def test_a_server_waits_until_somebody_is_there_and_comes_back(tiny_recipe, tmp_path, name, chances):
    done = run(tiny_recipe({**TWO, "algorithm": {"name": name}, "devices": alike(**chances)}), out=tmp_path / "run")
    asked = [e["clients"] for e in events_of(done.folder, "round_started")]
    assert len(asked) == 3 and all(asked)
    assert all(e["updates"] for e in events_of(done.folder, "round_finished"))
    seed = Recipe.load(done.folder / "recipe.yaml").seed
    fleet = Fleet(DevicesConfig.model_validate(alike(**chances)), CLIENTS[:2], seed)
    waited = [r for r in (1, 2, 3) if not fleet.there(r) or all(fleet.vanishes(c, r) for c in CLIENTS[:2])]
    assert waited  # else this says nothing


def test_where_enough_are_there_it_looks_once():
    """The draws of recipes that never had to wait stay what they were."""
    fleet = Fleet(DevicesConfig.model_validate({"available": 0.4}), CLIENTS, 5)
    plan = Schedule(
        CLIENTS, (), FederationConfig(clients_per_round=8, min_clients=2), 1, 0, 5, sampling=Sampling(there=fleet.there)
    )
    looked_once = 0
    for r in range(1, 60):
        drawn = numpy_generator(5, "available", r).random(len(CLIENTS))
        there = tuple(c for c, u in zip(CLIENTS, drawn, strict=True) if u < 0.4)
        assert (plan.sample(r) == there) == (len(there) >= 2)
        looked_once += len(there) >= 2
        assert len(plan.sample(r)) >= 2
    assert looked_once < 59
    with pytest.raises(RunFailed, match="1000 times in a row fewer than 2 of 8 clients were there for round 1: raise"):
        replace(plan, sampling=Sampling(there=lambda round, attempt: frozenset(CLIENTS[:1]))).sample(1)


@pytest.mark.parametrize("column", ["available", "dropout"])
def test_clients_that_never_come_are_refused(tiny_recipe, tmp_path, column):
    value = {"available": 0, "dropout": 1}[column]
    trace = traced(tmp_path / "t.csv", f"client-1,{value}", f"client-2,{value}", columns=f"client,{column}")
    with pytest.raises(UserError, match="only 0 of 2 clients can ever be there and end their work, and 1 are needed"):
        prepare(tiny_recipe({**TWO, "devices": alike(trace=trace)}), Watch())


# ------------------------------------------------------------------ memory and ranks


def test_a_client_without_room_is_never_sampled_and_it_is_said_once(tiny_recipe, tmp_path):
    trace = traced(tmp_path / "trace.csv", "client-1,1000", columns="client,memory")
    said = []
    values = {**TWO, "split.num_clients": 3, "devices": alike(trace=trace, memory={"median": 1e9})}
    done = run(tiny_recipe(values), out=tmp_path / "run", watch=Watch(say=said.append))
    assert {u["client"] for u in events_of(done.folder, "client_update")} == {"client-2", "client-3"}
    assert len([text for text in said if "no room for the model" in text]) == 1
    assert len(done.summary["per_client"]) == 3  # and measured all the same
    with pytest.raises(UserError, match=r"raise devices\.memory\.median"):
        prepare(tiny_recipe({**values, "devices": alike(memory={"median": 1e3})}), Watch())
    with pytest.raises(UserError, match="clients_per_round=3 but only 2 clients have room"):
        prepare(tiny_recipe({**values, "federation.clients_per_round": 3}), Watch())


def test_what_is_counted_as_room_is_the_model_and_what_training_keeps(tiny_recipe, tmp_path):
    setting = prepare(tiny_recipe(TWO), Watch())
    frozen = sum(p.numel() for n, p in setting.model.module.named_parameters() if "lora" not in n)
    trained = setting.model.adapter.layout.numel
    for optimizer, numbers in (("adamw", 4), ("sgd", 2)):
        needed = 4 * frozen + 4 * numbers * trained
        for room, fits in ((needed, True), (needed - 1, False)):
            trace = traced(tmp_path / "trace.csv", f"client-1,{room}", columns="client,memory")
            values = {**TWO, "train.optimizer": optimizer, "devices": alike(trace=trace)}
            assert ("client-1" in prepare(tiny_recipe(values), Watch()).schedule.training) == fits


def test_ranks_follow_the_devices_class(tiny_recipe, tmp_path):
    rows = ["client-1,8e9", "client-2,4e9", "client-3,1.1e9"]
    trace = traced(tmp_path / "trace.csv", *rows, columns="client,memory")
    values = {
        **TWO, "split.num_clients": 3, "algorithm": {"name": "hetlora"}, "adapter.rank": 8, "adapter.ranks": "by device",
        "devices": alike(trace=trace, memory={"median": 1e9}),
    }  # fmt: skip
    done = run(tiny_recipe(values), out=tmp_path / "run")
    ranks = {"client-1": 8, "client-2": 4, "client-3": 1}
    by_hand = run(tiny_recipe({**values, "adapter.ranks": ranks}), out=tmp_path / "by-hand")
    assert done.summary["adapter_sha256"] == by_hand.summary["adapter_sha256"]
    again = run(tiny_recipe({**values, "federation.rounds": 4}), out=done.folder, resume=True)
    assert again.summary["rounds"] == 4
    fleet = Fleet(DevicesConfig.model_validate({"speed": {"median": 1e9, "spread": 1.0}}), CLIENTS, 3)
    speeds = {c: fleet.devices[c].speed for c in CLIENTS}
    given = fleet.ranks(16)
    assert max(given.values()) == 16 and given[max(speeds, key=speeds.__getitem__)] == 16
    assert len(set(given.values())) > 1
    assert all((speeds[a] >= speeds[b]) <= (given[a] >= given[b]) for a in CLIENTS for b in CLIENTS)


# ------------------------------------------------------------------ kills, refusals

KILL_AT_THE_FOURTH_UPDATE = """
import os, signal
from fedloom.federation.record.events import Events
write, seen = Events.write, []
def dying(self, event, **fields):
    write(self, event, **fields)
    seen.extend([event] if event == "client_update" else [])
    if len(seen) == 4: os.kill(os.getpid(), signal.SIGKILL)
Events.write = dying
"""


@pytest.mark.parametrize(("name", "deadline"), [("fedavg", 10.0), ("fedbuff", None)])
def test_a_killed_run_has_the_same_times_and_bits(name, deadline, cli, recipe_file, tiny_recipe, tmp_path):
    values = {
        "split.splitter": "uniform", "split.num_clients": 6, "federation.clients_per_round": 4, "federation.rounds": 4,
        "algorithm": {"name": name}, "train.steps": 1, "train.optimizer_state": "keep", "evaluation.every": 2,
        "devices": {"speed": {"median": 1e6, "spread": 1.0}, "available": 0.8, "dropout": 0.1, "deadline": deadline},
        "operators": {"up": ["delta", {"name": "quantize", "bits": 8}, "zstd"]},
    }  # fmt: skip
    whole = run(tiny_recipe(values), out=tmp_path / "whole")
    recipe = recipe_file(values)
    assert cli("run", recipe, "--out", "run", setup=KILL_AT_THE_FOURTH_UPDATE).code == -signal.SIGKILL
    assert cli("run", "run", "--resume").code == 0
    resumed = tmp_path / "run"
    (again,) = events_of(resumed, "run_resumed")
    assert 0 < again["round"] < 4
    ended = json.loads((resumed / "summary.json").read_text())
    assert ended["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert ended["virtual"] == whole.summary["virtual"]
    kinds = {
        "client_update": ("round", "client", "loss", "staleness", "arrived"),
        "client_failed": ("round", "client", "reason", "detail"),
        "round_finished": ("round", "metrics"),
    }
    for kind, keys in kinds.items():
        told = [[[e[k] for k in keys] for e in events_of(f, kind)] for f in (resumed, whole.folder)]
        assert told[0] == told[1]
    late = [f for f in events_of(resumed, "client_failed") if f["reason"] == "too_late"]
    stale = [u for u in events_of(resumed, "client_update") if u["staleness"]]
    assert bool(late) == (name == "fedavg") and bool(stale) == (name == "fedbuff")


def test_a_run_of_an_older_checkpoint_format_is_refused_in_one_sentence(cli, recipe_file, tmp_path):
    """Version 1 had no virtual time of synchronous rounds: going on from it would begin the clock anew."""
    older = "import fedloom.federation.record.checkpoints\nfedloom.federation.record.checkpoints.VERSION = 1\n"
    assert cli("run", recipe_file({**TWO, "federation.rounds": 1}), "--out", "run", setup=older).code == 0
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    said = cli("run", "run", "--resume", "federation.rounds=2")
    assert said.code == 2
    assert "have version 1, and this fedloom reads version 2" in " ".join(said.err.split())
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"runtime.name": "distributed"}, "time is real with runtime.name=distributed"),
        ({"algorithm": {"name": "global"}}, "on everybody's data in one place"),
        ({"privacy": {"noise": 1.0, "clip": 1.0}}, "cannot be used with privacy"),
        ({"algorithm": {"name": "fedbuff"}, "devices": {"deadline": 3.0}}, "waits for nobody"),
        ({"devices": {"trace": "nowhere.csv"}}, "devices.trace=nowhere.csv cannot be read"),
        ({"devices": None, "algorithm": {"name": "hetlora"}, "adapter.ranks": "by device"}, "needs devices"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(values, said, tiny_recipe):
    with pytest.raises(UserError, match=said):
        prepare(tiny_recipe({"devices": {}, **values}), Watch())


@pytest.mark.parametrize(
    ("columns", "row", "said"),
    [
        ("client,colour", "client-1,red", "has the columns"),
        ("client,speed", "client-9,1e6", "'client-9', which is no client of this split"),
        ("client,speed", "client-1,1\nclient-1,2", "'client-1', twice"),
        ("client,speed", "client-1,0", "takes a number above 0"),
        ("client,dropout", "client-1,1.5", "takes a number from 0 to 1"),
        ("client,memory", "client-1,much", "memory='much'"),
        (
            "client,speed",
            "client-1,1\nclient-2,1,7",
            r"the columns client, speed, \(a cell too many\): it takes client and",
        ),
    ],
)
def test_a_trace_that_cannot_be_meant_is_refused(columns, row, said, tmp_path):
    config = DevicesConfig.model_validate({"trace": traced(tmp_path / "t.csv", row, columns=columns)})
    with pytest.raises(UserError, match=said):
        Fleet(config, CLIENTS, 0)
