"""Clients that fail, send what cannot be used, or are too few: the run goes on, or ends with one sentence."""

from __future__ import annotations

import json

import pytest

from fedloom.federation.record.events import read_events

# Python that a run executes first: an algorithm that misbehaves at one client in one round.
FAULTY = """
import torch
from fedloom.common import registry
from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.common.errors import ClientFailed
from fedloom.messages.types import Payload

class Faulty(FedAvg):
    calls = 0
    def shared_state(self):
        payload = super().shared_state()
        if self.client in {clients!r}:
            {fault}
        return payload

registry.algorithms.register("faulty", Faulty)
"""
FAULTS = {
    "raises": ("raise ClientFailed('test_reason', 'as this test wants it')", "test_reason"),
    "nan": ("payload = Payload({n: t.clone().fill_(float('nan')) for n, t in payload.tensors.items()})", "bad_payload"),
    "inf": ("first = next(iter(payload.tensors.values())); first.view(-1)[0] = float('inf')", "bad_payload"),
    "missing": ("payload.tensors.popitem()", "bad_payload"),
    "foreign": ("payload.tensors['foreign'] = torch.zeros(2)", "bad_payload"),
    "misshapen": ("payload.tensors[min(payload.tensors)] = torch.zeros(3, 3)", "bad_payload"),
    "nothing": ("payload = Payload()", "bad_payload"),
    "memory": ("raise torch.OutOfMemoryError('as on a GPU')", "out_of_memory"),
}


def faulty(fault: str, *clients: str) -> str:
    return FAULTY.replace("{clients!r}", repr(set(clients))).replace("{fault}", FAULTS[fault][0])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_client_is_an_event_and_the_others_are_averaged(cli, recipe_file, tmp_path, fault):
    done = cli("run", recipe_file(), "algorithm=faulty", "--out", "run", setup=faulty(fault, "last"))
    assert done.code == 0, done.err
    events = read_events(tmp_path / "run" / "events.jsonl")
    failed = [e for e in events if e["event"] == "client_failed"]
    assert [(e["round"], e["client"], e["kind"], e["reason"]) for e in failed] == [
        (1, "last", "train", FAULTS[fault][1]),
        (2, "last", "train", FAULTS[fault][1]),
    ]
    assert all(e["detail"] for e in failed)
    for finished in (e for e in events if e["event"] == "round_finished"):
        assert (finished["updates"], finished["failures"]) == (2, 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["failures"] == 2
    assert "client last failed" in done.err
    # The aggregate is that of the other two: weights 8 and 22 of the clients copy and upper.
    updates = [e for e in events if e["event"] == "client_update" and e["round"] == 1]
    mean = sum(e["loss"] * e["examples"] for e in updates) / sum(e["examples"] for e in updates)
    assert next(e["loss"] for e in events if e["event"] == "round_finished") == pytest.approx(mean)
    assert "test_reason" in (tmp_path / "run" / "report.html").read_text() or fault != "raises"


def test_below_quorum_the_run_ends_and_finished_rounds_are_kept(cli, recipe_file, tmp_path):
    recipe = recipe_file({"federation.rounds": 4, "federation.min_clients": 2})
    late = faulty("raises", "last", "upper").replace(
        "if self.client in", "if self.round_number() > 2 and self.client in"
    )
    late = late.replace("calls = 0", "rounds = {}\n    def round_number(self):\n        c = self.client\n"
                        "        self.rounds[c] = self.rounds.get(c, 0) + 1\n        return self.rounds[c]")  # fmt: skip
    done = cli("run", recipe, "algorithm=faulty", "--out", "run", setup=late)
    assert done.code == 1
    assert done.sentence.startswith("round 3 got 1 usable updates and needs 2")
    assert "2 finished rounds are kept" in done.sentence
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["round-0001", "round-0002"]
    assert not (tmp_path / "run" / "summary.json").exists()
    sound = FAULTY.replace("{clients!r}", "set()").replace("{fault}", "pass")
    assert cli("run", "run", "--resume", setup=sound).code == 0
    assert cli("run", recipe, "algorithm=faulty", "--out", "whole", setup=sound).code == 0
    hashes = {json.loads((tmp_path / n / "summary.json").read_text())["adapter_sha256"] for n in ("run", "whole")}
    assert len(hashes) == 1


@pytest.mark.parametrize("behaviour", ["fail", "skip"])
def test_a_loss_that_is_not_finite(cli, recipe_file, tmp_path, behaviour):
    """One client's loss becomes NaN at its first step; the rest of the run does not notice."""
    setup = """
from fedloom.common import registry
from fedloom.algorithms.averaging.fedavg import FedAvg
class Spiky(FedAvg):
    seen = set()
    def local_loss(self, model, batch, step_tokens):
        loss = super().local_loss(model, batch, step_tokens)
        if self.client == "upper" and self.client not in self.seen:
            self.seen.add(self.client)
            loss = loss * float("nan")
        return loss
registry.algorithms.register("spiky", Spiky)
"""
    options = ["algorithm=spiky", f"train.nonfinite={behaviour}"]
    done = cli("run", recipe_file(), *options, "--out", "run", setup=setup)
    assert done.code == 0, done.err
    events = read_events(tmp_path / "run" / "events.jsonl")
    failed = [e for e in events if e["event"] == "client_failed"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    if behaviour == "fail":
        assert [(e["round"], e["client"], e["reason"]) for e in failed] == [(1, "upper", "non_finite")]
        assert "step 1" in failed[0]["detail"]
        assert "train.nonfinite=skip" in failed[0]["detail"]
    else:
        assert failed == []
        skipped = {e["client"]: e["skipped_steps"] for e in events if e["event"] == "client_update" and e["round"] == 1}
        assert skipped == {"copy": 0, "last": 0, "upper": 1}
        assert (summary["skipped_steps"], summary["failures"]) == (1, 0)


def test_a_programming_error_in_a_client_is_not_hidden(cli, recipe_file):
    broken = FAULTY.replace("{clients!r}", "{'last'}").replace("{fault}", "payload.no_such_thing")
    done = cli("run", recipe_file(), "algorithm=faulty", "--out", "run", setup=broken)
    assert done.code == 1
    assert "AttributeError" in done.err
