"""Whole asynchronous runs: what they say, killed again and again, damaged, in real time, refused, and short of clients."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import fedloom
from fedloom.common import registry
from fedloom.common.errors import RunFailed
from fedloom.federation.record.events import read_events
from fedloom.federation.watch import Watch
from fedloom.messages.at_rest import load_tensors
from fedloom.messages.types import Failure, Outcome
from fedloom.runtimes.simulator import Simulator


class InThisOrder(Simulator):
    """The simulator's clients behind a runtime in real time: training comes back as `script` says."""

    capabilities = replace(Simulator.capabilities, virtual=False)
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
from fedloom.federation.record.events import Events
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
    handle = fedloom.federation.client.Client.handle

    def failing(client, assignment):
        if assignment.kind == "train" and assignment.round == 2 and assignment.client != "copy":
            return Failure(assignment.client, 2, "test", "as asked")
        return handle(client, assignment)

    monkeypatch.setattr(fedloom.federation.client.Client, "handle", failing)
    values = {"algorithm": {"name": "fedbuff", "buffer": 3}, "evaluation.every": 0}
    done = fedloom.run(tiny_recipe(values), out=tmp_path / "one")
    assert [len([u for u in counted(done.folder) if u[0] == r]) for r in (1, 2)] == [3, 1]
    assert done.summary["failures"] == 2
    with pytest.raises(RunFailed, match=r"round 2 got 1 usable updates and needs 2 .*: 1 finished rounds are kept"):
        fedloom.run(tiny_recipe({**values, "federation.min_clients": 2}), out=tmp_path / "two")
