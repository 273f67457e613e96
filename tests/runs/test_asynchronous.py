"""Rounds without a barrier: slots, versions, virtual and real order of arrival, failures, and a run that is killed.

The first half drives `InFlight` with clients that do nothing but answer; the second half runs recipes.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fedloom
from fedloom import registry
from fedloom.asynchronous import InFlight
from fedloom.checkpoint import load_tensors
from fedloom.clock import Speeds
from fedloom.config import FederationConfig
from fedloom.errors import RunFailed
from fedloom.experiment import Watch
from fedloom.rounds import Schedule
from fedloom.runtimes.simulator import Simulator
from fedloom.tracking import read_events
from fedloom.types import Assignment, Cost, Failure, Outcome, Payload, Update


class Durations:
    """A clock that takes each client's seconds from a table, or from a function of client and round."""

    def __init__(self, seconds):
        self.seconds_of = seconds

    def seconds(self, client, round, cost):
        return self.seconds_of(client, round) if callable(self.seconds_of) else self.seconds_of[client]


class Answers:
    """A virtual runtime whose clients answer at once; `fails` names (client, round) that do not. Counts what is sent."""

    def __init__(self, fails=()):
        self.fails, self.sent = set(fails), []

    def run(self, assignments):
        for assignment in assignments:
            if assignment is None:
                return
            client, round = assignment.client, assignment.round
            self.sent.append((client, round))
            if (client, round) in self.fails:
                yield Failure(client, round, "test", "as asked")
            else:
                yield Update(client, round, Payload({"w": torch.full((2,), float(round))}), num_examples=1)


def schedule(clients: str, slots: int, seed: int = 0) -> Schedule:
    return Schedule(tuple(clients), (), FederationConfig(clients_per_round=slots), 1, 0, seed)


def in_flight(folder: Path, runtime: Any, clients: str, slots: int, buffer: int, clock: Any, seed: int = 0) -> InFlight:
    def assign(client: str, round: int) -> Assignment:
        return Assignment("train", client, round, 9, Payload())

    return InFlight(runtime.run, assign, schedule(clients, slots, seed), buffer, clock, folder / "in-flight")


def usable(outcomes):
    return (o for o in outcomes if isinstance(o, Update))


def play(flight: InFlight, round: int) -> list[tuple[str, int, float]]:
    """(client, staleness, virtual time) of each outcome of a round, in order of arrival; failures among them."""
    seen = []

    def accepted(outcomes):
        for outcome in outcomes:
            told = flight.about(outcome)
            seen.append((outcome.client, told["staleness"], told["arrived"]))
            if isinstance(outcome, Update):
                assert torch.equal(outcome.payload.tensors["w"], torch.full((2,), float(outcome.round)))
                yield outcome

    flight.begin(round)
    list(flight.gather(accepted, lambda done, total: None))
    return seen


# ------------------------------------------------------------------ virtual time


def test_arrivals_and_staleness_by_hand(tmp_path):
    """Three slots, three clients that take 1, 2 and 5 seconds, two updates a round.

    t=0 a, b, c start from version 0.  1: a;  2: b → version 1, and a and b start again.  3: a;  4: b → version 2, again.
    5: c, two versions old, and a, who tie: the older one first → version 3, from which a and c start at 5.
    6: b, from version 2, and a: the older one first → version 4.
    """
    flight = in_flight(tmp_path, Answers(), "abc", 3, 2, Durations({"a": 1.0, "b": 2.0, "c": 5.0}))
    assert play(flight, 1) == [("a", 0, 1.0), ("b", 0, 2.0)]
    assert play(flight, 2) == [("a", 0, 3.0), ("b", 0, 4.0)]
    assert play(flight, 3) == [("c", 2, 5.0), ("a", 0, 5.0)]
    assert play(flight, 4) == [("b", 1, 6.0), ("a", 0, 6.0)]
    assert flight.metrics() == {"virtual_seconds": 6.0}


@pytest.mark.parametrize("seed", range(8))
def test_slots_are_filled_a_client_is_asked_once_a_version_and_nothing_is_lost(tmp_path, seed):
    draw = random.Random(seed)
    slots, buffer = draw.choice([(4, 2), (3, 3), (2, 1), (7, 4)])
    runtime = Answers({(c, r) for c in "abcdefg" for r in range(1, 9) if draw.random() < 0.15})
    clock = Durations(lambda client, round: random.Random(f"{seed}{client}{round}").expovariate(1.0))
    flight = in_flight(tmp_path, runtime, "abcdefg", slots, buffer, clock, seed)
    arrived, times = [], []
    for round in range(1, 9):
        before = len(runtime.sent)
        seen = play(flight, round)
        arrived += [(client, round - staleness) for client, staleness, _ in seen]
        times += [time for *_, time in seen]
        assert all(asked == round for _, asked in runtime.sent[before:])  # from the model as it is now
        # between two arrivals every free slot is given away, unless nobody is left who may start from this version
        assert len(runtime.sent) - len(arrived) <= slots
        spare = set("abcdefg") - {c for c, r in runtime.sent if r == round} - set(flight._waiting) - {seen[-1][0]}
        assert len(runtime.sent) - len(arrived) >= slots - 1 or not spare
        assert sum((c, round - s) not in runtime.fails for c, s, _ in seen) == buffer or not flight._waiting
    assert max(Counter(runtime.sent).values()) == max(Counter(arrived).values()) == 1
    assert set(arrived) <= set(runtime.sent)
    assert times == sorted(times)
    waiting = {(w.outcome.client, w.outcome.round) for w in flight._waiting.values()}
    assert waiting | set(arrived) == set(runtime.sent)
    assert len(list((tmp_path / "in-flight").glob("*.safetensors"))) == len(waiting - runtime.fails)


def test_who_is_asked_follows_from_seed_and_round_alone():
    first = [schedule("abcdefgh", 2, 5).queue(r) for r in (1, 2, 3)]
    assert first == [schedule("abcdefgh", 2, 5).queue(r) for r in (1, 2, 3)]
    assert len(set(first)) == 3
    assert {frozenset(q) for q in first} == {frozenset("abcdefgh")}
    assert schedule("abcdefgh", 2, 6).queue(1) != first[0]


def test_a_failed_client_frees_its_slot_at_once(tmp_path):
    runtime = Answers({("a", 1), ("b", 1)})
    flight = in_flight(tmp_path, runtime, "abcd", 2, 2, Durations(dict.fromkeys("abcd", 1.0)))
    seen = play(flight, 1)
    assert {c for c, *_ in seen} - {"a", "b"} == {"c", "d"}
    assert [c for c, _ in runtime.sent].count("a") <= 1


def test_a_round_has_what_it_has_when_nobody_is_left_to_wait_for(tmp_path):
    runtime = Answers({("a", 1), ("b", 1)})
    flight = in_flight(tmp_path, runtime, "abc", 3, 3, Durations(dict.fromkeys("abc", 1.0)))
    assert [c for c, *_ in play(flight, 1)][-1] == "c"
    assert not flight._waiting
    assert len(play(flight, 2)) == 3  # and all are asked again


def test_a_clients_speed_is_its_own_and_time_follows_its_tokens():
    clock, cost = Speeds(3, 0.5), Cost(train_tokens=2000)
    assert clock.seconds("a", 1, cost) == clock.seconds("a", 7, cost) == Speeds(3, 0.5).seconds("a", 1, cost)
    assert clock.seconds("a", 1, replace(cost, wall_seconds=9.0, upload_bytes=5)) == clock.seconds("a", 1, cost)
    assert clock.seconds("a", 1, Cost(train_tokens=6000)) == pytest.approx(3 * clock.seconds("a", 1, cost))
    assert Speeds(3, 0.0).seconds("a", 1, cost) == 2.0
    logs = torch.tensor([clock.seconds(f"client-{k}", 1, cost) / 2.0 for k in range(2000)]).log()
    assert float(logs.std()) == pytest.approx(0.5, rel=0.05)
    assert abs(float(logs.mean())) < 0.05


# ------------------------------------------------------------------ a runtime in real time


class LastFirst(Answers):
    """A runtime in real time that hands over what it was given last; `altered` changes an outcome on its way."""

    def __init__(self, altered=lambda outcome: [outcome]):
        super().__init__()
        self.altered, self.most = altered, 0

    def run(self, assignments):
        under_way: list[Assignment] = []
        while True:
            for assignment in assignments:
                if assignment is None:
                    break
                under_way.append(assignment)
            self.most = max(self.most, len(under_way))
            if not under_way:
                return
            yield from (o for answer in super().run([under_way.pop()]) for o in self.altered(answer))


def test_outcomes_are_taken_as_a_runtime_in_real_time_hands_them_over(tmp_path):
    runtime = LastFirst()
    flight = in_flight(tmp_path, runtime, "abc", 3, 1, None)
    order = schedule("abc", 3).queue(1)
    assert play(flight, 1) == [(order[2], 0, None)]
    newest = [play(flight, round) for round in (2, 3, 4)]  # the one that is asked anew is handed over first, each time
    assert newest == [[(order[2], 0, None)]] * 3
    assert runtime.most == 3
    for round in (5, 6):  # from now on nobody new is asked, so that those from version 0 come
        flight._schedule = replace(
            flight._schedule, training=tuple("abc"), federation=FederationConfig(clients_per_round=1)
        )
        assert play(flight, round) == [(order[6 - round], round - 1, None)]
    assert flight.metrics() == {}


def test_a_reply_that_was_not_asked_for_or_names_another_round_is_refused_and_blocks_no_slot(tmp_path):
    stray = Update("z", 1, Payload({"w": torch.zeros(2)}))
    wrong = LastFirst(lambda o: [stray, replace(o, round=o.round + 1) if o.client == "a" else o])
    flight = in_flight(tmp_path, wrong, "ab", 2, 2, None)
    outcomes = []

    def all_seen(arriving):
        for outcome in arriving:
            outcomes.append(outcome)
            if isinstance(outcome, Update):
                yield outcome

    for round in (1, 2):
        flight.begin(round)
        assert [u.client for u in flight.gather(all_seen, lambda done, total: None)] == ["b"]
    reasons = Counter((o.client, o.round, o.reason) for o in outcomes if isinstance(o, Failure))
    assert reasons[("a", 1, "bad_payload")] == reasons[("a", 2, "bad_payload")] == 1
    assert reasons[("z", 1, "unexpected")] == 4


class InThisOrder(Simulator):
    """The simulator's clients behind a runtime in real time: training comes back as `script` says."""

    virtual = False
    script: ClassVar[list[tuple[str, int]]] = []

    def run(self, assignments):
        under_way: dict[tuple[str, int], Outcome] = {}
        kind = ""
        while True:
            for assignment in assignments:
                if assignment is None:
                    break
                kind = assignment.kind
                (under_way[assignment.client, assignment.round],) = super().run([assignment])
            if not under_way:
                return
            key = next(k for k in self.script if k in under_way) if kind == "train" else next(iter(under_way))
            yield under_way.pop(key)


# ------------------------------------------------------------------ whole runs

#: Five clients, three in flight: kept moments, dropout and a falling rate, so that every kind of state matters.
RECIPE: dict[str, Any] = {
    "algorithm": {"name": "fedbuff", "buffer": 2}, "split.splitter": "uniform", "split.num_clients": 5,
    "federation.clients_per_round": 3, "federation.rounds": 5, "train.optimizer_state": "keep", "adapter.dropout": 0.1,
    "train.schedule": "cosine", "evaluation.every": 2, "runtime.speed_spread": 1.0, "train.steps": 1,
}  # fmt: skip


def digest(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["adapter_sha256"]


def client_states(folder: Path) -> dict[str, list]:
    return {
        str(p.relative_to(folder)): [(n, t.tolist()) for n, t in sorted(load_tensors(p).items())]
        for p in sorted((folder / "clients").rglob("*.safetensors"))
    }


def counted(folder: Path) -> list[tuple]:
    keys = ("round", "client", "loss", "tokens", "staleness", "arrived")
    return [tuple(e[k] for k in keys) for e in read_events(folder / "events.jsonl") if e["event"] == "client_update"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """Where the undisturbed run lies, once a test has made it."""
    return {"": tmp_path_factory.mktemp("whole")}


@pytest.fixture
def undisturbed(whole, tiny_recipe) -> Path:
    folder = whole[""] / "run"
    if not (folder / "summary.json").exists():
        fedloom.run(tiny_recipe(RECIPE), out=folder)
    return folder


def test_a_run_has_stale_updates_and_says_so(undisturbed):
    updates = counted(undisturbed)
    assert [u[0] for u in updates] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert any(staleness >= 2 for *_, staleness, _ in updates)
    times = [arrived for *_, arrived in updates]
    assert times == sorted(times)
    for e in read_events(undisturbed / "events.jsonl"):
        if e["event"] == "round_finished":
            own = [u for u in updates if u[0] == e["round"]]
            assert e["metrics"]["staleness"] == sum(u[4] for u in own) / 2
            assert e["metrics"]["oldest"] == max(u[4] for u in own)
            assert e["metrics"]["virtual_seconds"] == pytest.approx(own[-1][5], abs=1e-3)
            assert e["updates"] == 2
        if e["event"] == "round_started":
            assert len(e["clients"]) == len(set(e["clients"])) == 3
    assert not (undisturbed / "checkpoints" / "in-flight").exists()
    oldest = max(staleness for *_, staleness, _ in updates)
    page = (undisturbed / "report.html").read_text()
    assert f"{sum(u[4] for u in updates) / 10:.1f} versions of the model old on average, {oldest} at most" in page
    assert "By the clients' simulated speeds the rounds took" in page


KILL_AT_THE_THIRD_UPDATE = """
import os, signal
from fedloom.tracking import Events
write, seen = Events.write, []
def dying(self, event, **fields):
    write(self, event, **fields)
    seen.extend([event] if event == "client_update" else [])
    if len(seen) == 3: os.kill(os.getpid(), signal.SIGKILL)
Events.write = dying
"""


def test_killed_again_and_again_in_the_middle_of_a_round_it_ends_with_the_same_bits(
    cli, recipe_file, undisturbed, tmp_path
):
    """With one checkpoint kept, so that no more of the clients' past is there than has to be."""
    recipe = recipe_file({**RECIPE, "tracking.keep_checkpoints": 1})
    codes = [cli("run", recipe, "--out", "run", setup=KILL_AT_THE_THIRD_UPDATE).code]
    while codes[-1] == -signal.SIGKILL:
        codes.append(cli("run", "run", "--resume", setup=KILL_AT_THE_THIRD_UPDATE).code)
    assert codes == [-signal.SIGKILL] * 4 + [0]  # each time one more round was kept
    assert digest(tmp_path / "run") == digest(undisturbed)
    assert counted(tmp_path / "run") == counted(undisturbed)
    theirs = client_states(undisturbed)
    assert {k: v for k, v in client_states(tmp_path / "run").items() if v != theirs.get(k)} == {}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_outcome_that_waited_sends_the_run_back_to_the_checkpoint_before(
    damage, undisturbed, tiny_recipe, tmp_path
):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    waited = sorted((folder / "checkpoints" / "round-0005").glob("*-*.safetensors"))
    assert len(waited) >= 1
    damage(waited[0])
    said: list[str] = []
    fedloom.run(tiny_recipe(RECIPE), out=folder, resume=True, watch=Watch(say=said.append))
    assert any("checkpoint of round 5 is damaged" in text for text in said)
    assert digest(folder) == digest(undisturbed)
    assert client_states(folder) == client_states(undisturbed)
    assert counted(folder) == counted(undisturbed)


def test_a_runtime_in_real_time_that_delivers_in_that_order_gives_the_same_bits(
    undisturbed, tiny_recipe, tmp_path, monkeypatch
):
    """The virtual clock decides about the order of arrival, and about nothing else."""
    order = [(client, round - staleness) for round, client, *_, staleness, _ in counted(undisturbed)]
    rest = [(f"client-{k}", r) for k in range(1, 9) for r in range(1, 9)]
    monkeypatch.setitem(registry.runtimes._targets, "test-order", InThisOrder)
    monkeypatch.setattr(InThisOrder, "script", [*order, *rest])
    real = fedloom.run(tiny_recipe({**RECIPE, "runtime.name": "test-order"}), out=tmp_path / "real")
    assert [u[:5] for u in counted(real.folder)] == [u[:5] for u in counted(undisturbed)]
    assert {u[5] for u in counted(real.folder)} == {None}
    assert digest(real.folder) == digest(undisturbed)

    monkeypatch.setattr(
        InThisOrder, "script", sorted({*order, *((c, r) for c, _ in order for r in range(1, 9))}, reverse=True)
    )
    other = fedloom.run(tiny_recipe({**RECIPE, "runtime.name": "test-order"}), out=tmp_path / "other")
    assert digest(other.folder) != digest(undisturbed)
    assert other.summary["loss"]["after"] < other.summary["loss"]["before"]


def test_a_stale_update_that_is_refused_is_told_of_in_the_round_that_it_is_missing_from(
    undisturbed, tiny_recipe, tmp_path, monkeypatch
):
    """As every event of a round, so that a resumed run voids it with its round."""
    fedbuff = registry.algorithms.get("fedbuff")
    accept = fedbuff.accept

    def refusing(server, update):
        accept(server, update)
        if server.staleness(update):
            raise ValueError("too old")

    monkeypatch.setattr(fedbuff, "accept", refusing)
    run = fedloom.run(tiny_recipe({**RECIPE, "evaluation.every": 0}), out=tmp_path / "run")
    events = read_events(run.folder / "events.jsonl")
    rounds = [e["round"] for e in events if e["event"] in {"round_started", "client_failed", "round_finished"}]
    assert rounds == sorted(rounds)
    assert run.summary["failures"] == sum(e["event"] == "client_failed" for e in events) > 0
    assert {u[4] for u in counted(run.folder)} == {0}


def test_the_run_ends_when_too_few_can_come(tiny_recipe, tmp_path, monkeypatch):
    handle = fedloom.client.Client.handle

    def failing(client, assignment):
        if assignment.kind == "train" and assignment.round == 2 and assignment.client != "copy":
            return Failure(assignment.client, 2, "test", "as asked")
        return handle(client, assignment)

    monkeypatch.setattr(fedloom.client.Client, "handle", failing)
    values = {"algorithm": {"name": "fedbuff", "buffer": 3}, "evaluation.every": 0}
    done = fedloom.run(tiny_recipe(values), out=tmp_path / "one")
    assert [len([u for u in counted(done.folder) if u[0] == r]) for r in (1, 2)] == [3, 1]
    assert done.summary["failures"] == 2
    with pytest.raises(RunFailed, match=r"round 2 got 1 usable updates and needs 2 .*: 1 finished rounds are kept"):
        fedloom.run(tiny_recipe({**values, "federation.min_clients": 2}), out=tmp_path / "two")
