"""The conversation between server and site, without the engine: real agents, an in-process link, and what can go wrong."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from fedloom.common.logs import heard_by
from fedloom.messages import wire
from fedloom.messages.types import Assignment, Failure, Payload, Update
from fedloom.runtimes import versions
from fedloom.runtimes.ranks.worker import Stopped, WorkerLate
from fedloom.runtimes.sites.link import PIECE, Answer
from fedloom.runtimes.sites.policy import Policy
from fedloom.runtimes.sites.runtime import SPARE_BYTES, Distributed, StartAgain
from tests.helpers.sites import BRISK, Sites, killed

RECIPE = {
    "algorithm": {"name": "fedavg"}, "adapter": {"method": "lora"}, "federation": {"rounds": 3}, "model": {"name": "m"},
}  # fmt: skip
COUNTS = {"train": 5, "validation": 1, "test": 2, "questions": 0, "tokens": 40}


def echo(kind, body, deadline=None, stopped=None):
    """A trainer that sends the payload back, doubled."""
    if kind == "prepare":
        return {"state": "done"}, json.dumps(COUNTS).encode()
    try:
        given = wire.decode_assignment(body)
    except wire.WireError as error:
        return {"state": "failed", "reason": "bad_message", "detail": str(error)}, b""
    payload = Payload({n: t * 2 for n, t in given.payload.tensors.items()})
    return {"state": "done"}, wire.encode_outcome(Update(given.client, given.round, payload, 5, 40, {"loss": 1.0}))


class Changing:
    """A trainer whose next answers to work are taken from a list, and then it is `echo`."""

    def __init__(self, *behaviours):
        self.behaviours = list(behaviours)

    def __call__(self, kind, body, deadline=None, stopped=None):
        if kind == "work" and self.behaviours:
            return self.behaviours.pop(0)(kind, body, deadline, stopped)
        return echo(kind, body)


def assignments(*clients, round=1, numel=3):
    for client in clients:
        yield Assignment("train", client, round, 3, Payload({"w": torch.arange(numel, dtype=torch.float32)}))


def federation(tmp_path, trainers, patience=BRISK, policy=None, leave=lambda dead: False):
    link = Sites(tmp_path, trainers, policy)
    said = []
    with heard_by(said.append):
        runtime = Distributed(link, {f"client-{s}": s for s in trainers}, list(trainers), patience, leave)
        counts = runtime.greet(RECIPE, "0" * 32)
    return link, runtime, counts, said


def outcomes(runtime, *clients, round=1, numel=3):
    return {o.client: o for o in runtime.run(assignments(*clients, round=round, numel=numel))}


def test_work_goes_to_its_site_and_comes_back_with_its_bytes_counted(tmp_path):
    link, runtime, counts, _ = federation(tmp_path, {"a": echo, "b": echo})
    assert counts == {"client-a": COUNTS, "client-b": COUNTS}
    found = outcomes(runtime, "client-a", "client-b")
    message = wire.encode_assignment(next(assignments("client-a")))
    for client in ("client-a", "client-b"):
        assert torch.equal(found[client].payload.tensors["w"], torch.arange(3) * 2.0)
        assert found[client].cost.download_bytes == len(message)
        assert found[client].cost.upload_bytes > 12
    asked = [verb for site, verb in link.log if site == "a"]
    assert "fetch" not in asked, "what is small comes with the news that it is there"
    log, until = tmp_path / "a" / "audit.jsonl", time.monotonic() + 10
    while len(log.read_text().splitlines()) < len(asked) and time.monotonic() < until:
        time.sleep(0.01)  # nobody waits for the answer to `drop`
    assert len(log.read_text().splitlines()) == len(asked), "every answer is in the audit log"
    link.close()


def test_a_large_message_travels_in_bounded_pieces(tmp_path):
    link, runtime, _, _ = federation(tmp_path, {"a": echo})
    numel = PIECE // 4 + 1000
    found = outcomes(runtime, "client-a", numel=numel)["client-a"]
    assert torch.equal(found.payload.tensors["w"], torch.arange(numel) * 2.0)
    verbs = [verb for _, verb in link.log]
    assert verbs.count("put") == 1 + 2, "the recipe in one piece, the assignment in two"
    assert verbs.count("fetch") == 1, "an answer's first piece comes with the news that it is there"
    until = time.monotonic() + 10
    while any(len(work.result) for work in link.agents["a"]._works.values()) and time.monotonic() < until:
        time.sleep(0.01)  # nobody waits for the answer to `drop`
    assert not any(len(work.result) for work in link.agents["a"]._works.values()), "the site holds nothing of it"
    link.close()


def test_outcomes_come_as_they_arrive_and_none_waits_for_one(tmp_path):
    gate = threading.Event()

    def slow(kind, body, deadline, stopped):
        assert gate.wait(120)
        return echo(kind, body)

    link, runtime, _, _ = federation(tmp_path, {"a": Changing(slow), "b": echo})
    pulled = []

    def source():
        for item in (*assignments("client-a", "client-b"), None, *assignments("client-b", round=2)):
            pulled.append(item and item.client)
            yield item

    arriving = runtime.run(source())
    first = next(arriving)
    assert (first.client, pulled) == ("client-b", ["client-a", "client-b", None])
    second = next(arriving)
    assert (second.client, second.round) == ("client-b", 2)
    gate.set()
    assert [o.client for o in arriving] == ["client-a"]
    link.close()


def late(kind, body, deadline, stopped):
    """Works until it is told to stop or its time is over, as a trainer in a loop would."""
    until = time.monotonic() + (deadline or 60.0)
    while time.monotonic() < until:
        if stopped():
            raise Stopped
        time.sleep(0.01)
    raise WorkerLate


@pytest.mark.parametrize(("behaviour", "reason"), [(killed, "crashed"), (late, "late")])
def test_a_trainer_that_dies_or_hangs_costs_one_update_and_is_back(tmp_path, behaviour, reason):
    patience = replace(BRISK, deadline=3.0)  # b answers at once, on a busy machine too
    link, runtime, _, _ = federation(tmp_path, {"a": Changing(behaviour), "b": echo}, patience)
    found = outcomes(runtime, "client-a", "client-b")
    assert isinstance(found["client-a"], Failure)
    assert found["client-a"].reason == reason
    assert isinstance(found["client-b"], Update)
    assert isinstance(outcomes(runtime, "client-a", round=2)["client-a"], Update)
    link.close()


def test_a_site_keeps_the_deadline_itself_when_the_server_is_gone(tmp_path):
    """Nobody calls the work off: the site's own clock ends it."""
    link = Sites(tmp_path, {"a": Changing(late)})
    agent = link.agents["a"]
    orders = json.dumps({"recipe": RECIPE}).encode()
    put = {"verb": "put", "offset": 0}
    agent.answer({**put, "work": "p", "kind": "prepare", "deadline": 60.0, "size": len(orders)}, orders)
    assert agent.answer({"verb": "wait", "work": "p", "seconds": 60.0}, b"").header["state"] == "done"
    message = wire.encode_assignment(next(assignments("client-a")))
    agent.answer({**put, "work": "w", "kind": "work", "deadline": 0.2, "size": len(message)}, message)
    ended = agent.answer({"verb": "wait", "work": "w", "seconds": 60.0}, b"")
    assert (ended.header["state"], ended.header["reason"]) == ("refused", "late")
    link.close()


def test_a_silent_site_is_lost_then_absent_then_taken_back(tmp_path, caplog):
    link, runtime, _, _ = federation(tmp_path, {"a": echo, "b": echo})
    link.silent.add("a")
    began, before = time.monotonic(), len(link.log)
    assert outcomes(runtime, "client-a")["client-a"].reason == "lost"
    assert time.monotonic() - began >= BRISK.silence
    assert len(link.log) - before > 1, "asked again until its silence was too long"
    before = len(link.log)
    assert outcomes(runtime, "client-a", round=2)["client-a"].reason == "absent"
    assert link.log[before:] == [("a", "hello")], "a site that is known to be dead is asked once and not waited for"
    link.silent.clear()
    assert isinstance(outcomes(runtime, "client-a", round=3)["client-a"], Update)
    assert caplog.messages == ["a is lost: it gets work again in the next round", "a is back"]
    link.close()


def test_a_site_that_was_started_again_is_told_the_recipe_again(tmp_path):
    link, runtime, _, _ = federation(tmp_path, {"a": echo})
    link.agents["a"].close()
    link.agents["a"] = link.agent("a")
    failed = outcomes(runtime, "client-a")["client-a"]
    assert failed.reason == "lost"
    assert "knows nothing of the rounds before" in failed.detail
    assert isinstance(outcomes(runtime, "client-a", round=2)["client-a"], Update)
    link.close()


def test_a_site_that_is_back_outside_this_job_ends_it(tmp_path):
    asked = []

    def leave(dead):
        asked.append(set(dead))
        return True

    link, runtime, _, _ = federation(tmp_path, {"a": echo, "b": echo}, leave=leave)
    outcomes(runtime, "client-a", "client-b")
    assert asked == [], "nobody is lost"
    link.silent.add("a")
    outcomes(runtime, "client-a")
    with pytest.raises(StartAgain):
        outcomes(runtime, "client-b", round=2)
    assert asked == [{"a"}]
    link.close()


def tampered(change):
    """A trainer whose message is altered after it was made."""

    def answer(kind, body, deadline, stopped):
        header, message = echo(kind, body)
        return header, change(message)

    return answer


def flipped(message):
    data = bytearray(message)
    data[len(data) // 2] ^= 1
    return bytes(data)


def spoken_for(client, round):
    def answer(kind, body, deadline, stopped):
        return {"state": "done"}, wire.encode_outcome(Update(client, round, Payload(), 5, 40, {"loss": 1.0}))

    return answer


HOSTILE = {
    "truncated": tampered(lambda m: m[:-5]),
    "altered": tampered(flipped),
    "nothing": tampered(lambda m: b""),
    "another client": spoken_for("client-b", 1),
    "another round": spoken_for("client-a", 7),
    "its own question": tampered(lambda m: wire.encode_assignment(next(assignments("client-a")))),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_message_is_a_failure_that_names_the_reason(tmp_path, what):
    link, runtime, _, _ = federation(tmp_path, {"a": Changing(HOSTILE[what]), "b": echo})
    found = outcomes(runtime, "client-a", "client-b")
    assert isinstance(found["client-a"], Failure)
    assert found["client-a"].reason == "bad_message"
    assert found["client-a"].detail
    assert isinstance(found["client-b"], Update)
    link.close()


class Lying:
    """A link whose site says what it likes of the size of its answer."""

    def __init__(self, link, **lies):
        self.link = link
        self.lies = lies

    def ask(self, site, header, data, timeout):
        answer = self.link.ask(site, header, data, timeout)
        lie = self.lies.get(header["verb"])
        return lie(answer) if lie and answer and header.get("work", "").endswith("-1") else answer


def test_an_announced_size_is_bounded_before_anything_is_fetched(tmp_path):
    link = Sites(tmp_path, {"a": echo})
    lying = Lying(link, wait=lambda a: Answer({"state": "done", "size": SPARE_BYTES * 100}))
    runtime = Distributed(lying, {"client-a": "a"}, ["a"], BRISK)
    runtime.greet(RECIPE, "0" * 32)
    before = len(link.log)
    failed = outcomes(runtime, "client-a")["client-a"]
    assert failed.reason == "too_large"
    assert "fetch" not in [verb for _, verb in link.log[before:]]
    link.close()


@pytest.mark.parametrize(
    ("verb", "data"), [("wait", b"x" * 1000), ("wait", b"x" * PIECE * 2), ("fetch", b""), ("fetch", b"x" * 100_000)]
)
def test_a_piece_of_another_size_is_refused(tmp_path, verb, data):
    link = Sites(tmp_path, {"a": echo})
    lying = Lying(link, **{verb: lambda a: Answer(a.header, data)})
    runtime = Distributed(lying, {"client-a": "a"}, ["a"], BRISK)
    runtime.greet(RECIPE, "0" * 32)
    failed = outcomes(runtime, "client-a", numel=PIECE // 4 if verb == "fetch" else 3)["client-a"]
    assert failed.reason == "bad_message"
    assert "another size" in failed.detail
    link.close()


def test_a_site_that_only_ever_asks_for_the_recipe_is_no_site(tmp_path):
    link = Sites(tmp_path, {"a": echo})
    ask = link.ask
    link.ask = lambda site, header, data, timeout: (
        Answer({"state": "unprepared"}) if header["verb"] == "put" else ask(site, header, data, timeout)
    )
    runtime = Distributed(link, {"client-a": "a"}, ["a"], BRISK)
    with heard_by((said := []).append):
        assert runtime.greet(RECIPE, "0" * 32) == {}
    assert "bad_message" in said[0]
    link.close()


@pytest.mark.parametrize("counts", [b"{}", b"[]", b"no", json.dumps({**COUNTS, "train": -1}).encode()])
def test_an_account_of_data_that_cannot_be_is_no_account(tmp_path, counts):
    def odd(kind, body, deadline=None, stopped=None):
        return ({"state": "done"}, counts) if kind == "prepare" else echo(kind, body)

    link, _, found, said = federation(tmp_path, {"a": odd, "b": echo})
    assert list(found) == ["client-b"]
    assert any("a takes no part for now (bad_message)" in s for s in said)
    link.close()


def test_versions_that_do_not_match_are_refused_with_a_sentence_on_both_sides(tmp_path, monkeypatch, caplog):
    link = Sites(tmp_path, {"a": echo, "b": echo})
    here = versions.own()
    runtime = Distributed(Lying(link, hello=lambda a: a), {"client-a": "a", "client-b": "b"}, ["a", "b"], BRISK)
    ask = link.ask

    def older(site, header, data, timeout):
        answer = ask(site, header, data, timeout)
        if site == "a" and header["verb"] == "hello":
            return Answer({**answer.header, "versions": {**here, "fedloom": "0.0.1"}})
        return answer

    monkeypatch.setattr(link, "ask", older)
    assert list(runtime.greet(RECIPE, "0" * 32)) == ["client-b"]
    assert "(version): fedloom is" in caplog.messages[0]
    assert "0.0.1 there" in caplog.messages[0]
    agent = link.agents["b"]
    agent.answer({"verb": "hello", "versions": {**here, "torch": "1.0.0"}}, b"")
    refused = agent.answer({"verb": "put", "work": "x", "kind": "work", "offset": 0, "size": 0, "deadline": None}, b"")
    assert refused.header["reason"] == "version"
    assert "torch is" in caplog.messages[-1]
    link.close()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"algorithms": ["fedprox"]}, "does not allow fedavg"),
        ({"rounds": 2}, "allows 2"),
        ({"largest_epsilon": 8}, "no privacy.epsilon"),
    ],
)
def test_a_site_refuses_what_its_policy_does_not_allow(tmp_path, policy, words):
    link, _, counts, said = federation(tmp_path, {"a": echo}, policy=Policy.model_validate(policy))
    assert counts == {}
    assert "a takes no part for now (refused)" in said[0]
    assert words in said[0]
    link.close()


def test_questions_that_make_no_sense_get_a_short_answer(tmp_path):
    link = Sites(tmp_path, {"a": echo}, Policy.model_validate({"max_message_bytes": 1 << 20}))
    agent = link.agents["a"]
    odd = [
        ({"verb": "exec"}, "unknown"), ({"verb": "wait", "work": "?"}, "unknown"), ({"verb": "fetch", "work": "?"}, "unknown"),
        ({"verb": "put", "work": "w", "kind": "shell", "offset": 0, "size": 0}, "refused"),
        ({"verb": "put", "work": "w", "kind": "prepare", "offset": -1, "size": 4}, "refused"),
        ({"verb": "put", "work": "w", "kind": "prepare", "offset": True, "size": "4"}, "refused"),
    ]  # fmt: skip
    for header, state in odd:
        assert agent.answer(header, b"").header["state"] == state, header
    large = agent.answer({"verb": "put", "work": "w", "kind": "prepare", "offset": 0, "size": 1 << 40}, b"x" * PIECE)
    assert large.header["reason"] == "too_large"
    link.close()
