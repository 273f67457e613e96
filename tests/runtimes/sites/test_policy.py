"""A site's policy: what a recipe may ask for here, and that nothing but numbers and names leaves."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch

from fedloom.common.errors import UserError
from fedloom.messages.types import Cost, Failure, Payload, Update
from fedloom.runtimes.sites.policy import Audit, Policy, Refused

OPEN = Policy.model_validate({})

SECRET = "Patient 4711 was treated in May"


def update(metrics=None, **payload) -> Update:
    return Update("a", 1, Payload({"w": torch.ones(2)}, **payload), 3, 40, metrics or {})


# ------------------------------------------------------------------ what leaves

CODING = {
    "operators": [{"name": "delta"}, {"name": "quantize", "bits": 8, "error_feedback": False, "rounding": None}],
    "table": [["layers.0.q_proj.lora_A.weight", "float32", [2, 3]]],
    "notes": [{}, {"scale": 0.5}],
}


def test_numbers_and_names_leave_as_they_are():
    sent = update(
        {"loss": 1.5, "questions/right": 2, "tokens": 0},
        meta={"seeds": [1, 2.5, None, True], "digest": "sha256:0a/b+c", "nested": {"a": ["x", "y"]}},
        coding=CODING,
    )
    before = copy.deepcopy((sent.payload.meta, sent.payload.coding))
    assert OPEN.outgoing(sent) is sent
    assert (sent.payload.meta, sent.payload.coding) == before
    assert OPEN.outgoing(update()).payload.tensors.keys() == {"w"}


@pytest.mark.parametrize(
    "meta",
    [
        {"note": SECRET},
        {SECRET: 1},
        {"fine": 1, "note": SECRET},
        {"fine": 1, SECRET: 1},
        {"list": [SECRET]},
        {"list": ["fine", SECRET]},
        {"list": [1, [2, SECRET]]},
        {"tuple": ("fine", SECRET)},
        {"first": ["fine"], "second": [1, {"deep": {"deeper": SECRET}}]},
        {"first": {"fine": 1}, "second": {"fine": 1, SECRET: 2}},
        {"line": "two\nlines"},
        {"line": "ends\n"},
        {"long": "x" * 201},
        {"foreign": "Müller"},
    ],
    ids=str,
)
def test_a_text_anywhere_in_the_metadata_stays(meta):
    """Beside a real tensor, and wherever it stands among the things that may leave."""
    with pytest.raises(Refused, match="has text where only names and numbers are allowed") as caught:
        OPEN.outgoing(update({"loss": 1.0}, meta=meta))
    assert "4711" not in str(caught.value)


def test_a_name_of_two_hundred_characters_is_the_longest():
    assert OPEN.outgoing(update(meta={"long": "x" * 200}))


@pytest.mark.parametrize(
    "coding",
    [
        {**CODING, "table": [CODING["table"][0], [SECRET, "float32", [1]]]},
        {**CODING, "notes": [{}, {"scale": 0.5, "why": SECRET}]},
        {**CODING, "operators": [{"name": "delta"}, {"name": "quantize", "by": SECRET}]},
        {**CODING, SECRET: []},
    ],
    ids=["table", "notes", "operators", "key"],
)
def test_a_text_in_what_operators_noted_stays(coding):
    with pytest.raises(Refused, match="has text where only names and numbers are allowed"):
        OPEN.outgoing(update(coding=coding))


def test_a_text_as_a_tensors_name_stays():
    for tensors in ({SECRET: torch.ones(1)}, {"w": torch.ones(1), SECRET: torch.ones(1)}):
        with pytest.raises(Refused, match="has text where only names and numbers are allowed"):
            OPEN.outgoing(Update("a", 1, Payload(tensors)))


@pytest.mark.parametrize(
    "metrics",
    [
        {"right": True},
        {"loss": 1.0, "right": False},
        {"loss": "1.0"},
        {"loss": None},
        {"loss": [1.0]},
        {SECRET: 1.0},
        {"loss": 1.0, SECRET: 1.0},
    ],
    ids=str,
)
def test_metrics_are_numbers_with_names(metrics):
    """A boolean is one answer of one person, and no sum."""
    with pytest.raises(Refused, match="metrics have a value that is not a number"):
        OPEN.outgoing(update(metrics))


def test_a_failure_leaves_as_a_code_and_its_words_stay():
    cost = Cost(upload_bytes=7)
    failure = Failure("a", 2, "out_of_memory", SECRET, cost)
    left = OPEN.outgoing(failure)
    assert left == Failure("a", 2, "out_of_memory", "the site's log says more", cost)
    for reason in (SECRET, "", "Upper", "x" * 41, "_x", "a-b", "late\n"):
        assert OPEN.outgoing(replace(failure, reason=reason)).reason == "error"
    assert OPEN.outgoing(replace(failure, reason="x" * 40)).reason == "x" * 40


def test_a_site_may_let_its_words_leave():
    free = Policy.model_validate({"error_text": True})
    assert free.outgoing(Failure("a", 1, "error", SECRET)).detail == SECRET
    assert (free.words(SECRET), OPEN.words(SECRET)) == (SECRET, "the site's log says more")


# ------------------------------------------------------------------ what a recipe may ask for

RECIPE = {
    "algorithm": {"name": "fedavg"},
    "adapter": {"method": "lora"},
    "federation": {"rounds": 10},
    "model": {"name": "m", "trust_remote_code": False},
    "operators": {"up": [{"name": "delta"}, {"name": "deflate"}], "down": [], "initial": None},
    "hooks": [{"name": "ema"}, {"name": "early_stopping"}],
    "privacy": {"epsilon": 4.0},
    "runtime": {"name": "distributed"},
}


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"algorithms": ["fedprox", "fedavg"], "methods": ["lora"], "rounds": 10, "largest_epsilon": 4},
        {"operators": ["delta", "deflate"], "hooks": ["early_stopping", "ema"]},
    ],
)
def test_what_the_policy_allows_is_not_refused(policy):
    Policy.model_validate(policy).check(RECIPE)
    bare = {key: RECIPE[key] for key in ("algorithm", "adapter", "federation", "model")}
    if "largest_epsilon" not in policy:
        Policy.model_validate(policy).check(bare)


@pytest.mark.parametrize(
    ("policy", "changed", "sentence"),
    [
        ({"algorithms": ["fedprox", "flora"]}, {}, "does not allow fedavg (algorithms: fedprox, flora)"),
        ({"algorithms": []}, {}, "does not allow fedavg (algorithms: none)"),
        ({"methods": ["ia3"]}, {}, "does not allow lora (methods: ia3)"),
        ({"operators": ["delta"]}, {}, "does not allow deflate (operators: delta)"),
        ({"operators": []}, {"operators": {"initial": [{"name": "bf16"}]}}, "does not allow bf16 (operators: none)"),
        ({"hooks": ["ema"]}, {}, "does not allow early_stopping (hooks: ema)"),
        ({"rounds": 9}, {}, "the recipe has 10 rounds and this site's policy allows 9 (rounds)"),
        (
            {"largest_epsilon": 3.5},
            {},
            "the recipe has privacy.epsilon=4.0 and this site's policy asks for at most 3.5",
        ),
        ({"largest_epsilon": 8}, {"privacy": None}, "the recipe has no privacy.epsilon and"),
        ({"largest_epsilon": 8}, {"privacy": {}}, "the recipe has no privacy.epsilon and"),
        ({"largest_epsilon": 8}, {"privacy": {"epsilon": 0}}, "the recipe has privacy.epsilon=0 and"),
        ({"largest_epsilon": 8}, {"privacy": {"epsilon": "1"}}, "the recipe has privacy.epsilon=1 and"),
        ({}, {"model": {"name": "m", "trust_remote_code": True}}, "model.trust_remote_code, which no site grants"),
    ],
)
def test_what_it_does_not_allow_is_named(policy, changed, sentence):
    with pytest.raises(Refused, match=re.escape(sentence)):
        Policy.model_validate(policy).check({**RECIPE, **changed})


def test_ranks_are_bounded():
    policy = Policy.model_validate({"ranks": 2})
    assert policy.ranks_of({"runtime": {}}) == 1
    assert [policy.ranks_of({"runtime": {"ranks": n}}) for n in (1, 2)] == [1, 2]
    assert Policy.model_validate({"ranks": 1}).ranks_of({"runtime": {"ranks": 1}}) == 1
    assert OPEN.ranks_of({"runtime": {"ranks": 8}}) == 8
    for wanted in (0, -1, 3, "2", 1.0, None):
        with pytest.raises(Refused, match=f"asks for {wanted} ranks and this site's policy allows 2"):
            policy.ranks_of({"runtime": {"ranks": wanted}})


# ------------------------------------------------------------------ the files


def test_a_policy_is_read_from_its_file(tmp_path):
    path = tmp_path / "policy.yaml"
    assert Policy.load(path) == OPEN
    path.write_text("")
    assert Policy.load(path) == OPEN
    path.write_text("rounds: 3\nhooks: []\n")
    loaded = Policy.load(path)
    assert (loaded.rounds, loaded.hooks, loaded.algorithms) == (3, [], None)
    assert loaded.max_message_bytes == 8 * 1024**3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rounds: 0", "greater than or equal to 1"),
        ("ranks: 0", "greater than or equal to 1"),
        ("largest_epsilon: 0", "greater than 0"),
        ("max_message_bytes: 1048575", "greater than or equal to 1048576"),
        ("roundz: 3", "roundz|[Ee]xtra"),
        ("rounds: [", "it is not YAML"),
        ("- rounds", "policy"),
    ],
)
def test_a_policy_that_cannot_be_used_is_a_sentence(tmp_path, text, sentence):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        Policy.load(path)
    assert str(path) in str(caught.value)


def test_the_audit_log_has_a_line_for_each_message(tmp_path):
    audit = Audit(tmp_path / "deep" / "audit.jsonl")
    audit.left("result", b"abc", bytearray(b"de"), memoryview(b"f"), work="w1", round=3)
    audit.left("hello")
    lines = [json.loads(line) for line in (tmp_path / "deep" / "audit.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines] == ["result", "hello"]
    assert (lines[0]["bytes"], lines[0]["work"], lines[0]["round"]) == (6, "w1", 3)
    assert lines[0]["sha256"] == hashlib.sha256(b"abcdef").hexdigest()
    assert (lines[1]["bytes"], lines[1]["sha256"]) == (0, hashlib.sha256(b"").hexdigest())
    Audit(tmp_path / "deep" / "audit.jsonl").left("again")
    assert len((tmp_path / "deep" / "audit.jsonl").read_text().splitlines()) == 3
