"""The record of an evaluation goes into a file and comes back, by old files' keys too."""

from __future__ import annotations

import json

from fedloom.federation.record.evaluation import Evaluation
from fedloom.federation.record.events import SCHEMA

OLD = {
    "loss": 1.5, "score": None, "questions": 0, "tokens": 12,
    "clients": {"a": {"loss": 1.5, "tokens": 12, "score": None, "questions": 0}},
    "spread": None, "seconds": 0.25, "pooled": False, "emulator": None,
    "preference": {"loss": 0.5, "accuracy": 1.0, "margin": 2.0, "pairs": 3}, "virtual_seconds": None,
}  # fmt: skip


def test_a_record_comes_back_and_its_keys_stay_in_their_order():
    found = Evaluation.from_json(json.loads(json.dumps(OLD)))
    assert found.tokens == 12 and found.clients["a"]["loss"] == 1.5
    assert json.dumps(found.to_json()) == json.dumps(OLD)
    assert Evaluation.from_json(found.to_json()) == found


def test_a_record_has_the_fields_of_its_event_and_is_read_from_one():
    assert {"round", *OLD} == set(SCHEMA["evaluation"])
    event = {"event": "evaluation", "time": 1.0, "round": 2, **OLD}
    assert Evaluation.from_json(event) == Evaluation.from_json(OLD)
