"""Operators in whole runs: bytes that fall, results that stay, references that agree, residuals that survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedloom import run
from fedloom.algorithms.base import Algorithm
from fedloom.common.errors import UserError
from fedloom.experiment.prepare import prepare
from fedloom.federation.client import Client
from fedloom.federation.record.events import Events, read_events
from fedloom.federation.rounds.synchronous import ClientOrder
from fedloom.federation.watch import Watch
from fedloom.messages import wire
from fedloom.messages.operators.channel import Chains, ClientChannel, ServerChannel
from fedloom.messages.types import Assignment, Cost, Failure, Payload, Update
from tests.helpers import tiny
from tests.helpers.payloads import same

INT8 = {"name": "quantize", "bits": 8}
INT4 = {"name": "quantize", "bits": 4, "error_feedback": True, "rounding": "stochastic"}


def summary(recipe, folder: Path) -> dict:
    return run(recipe, folder).summary


@pytest.fixture(scope="module")
def plain() -> dict:
    return {}


@pytest.fixture
def undisturbed(plain, tiny_recipe, tmp_path) -> dict:
    """The summary of a run without operators; it is run once."""
    if not plain:
        plain.update(summary(tiny_recipe(), tmp_path / "plain"))
    return plain


def test_lossless_chains_change_no_bit_of_the_result(undisturbed, tiny_recipe, tmp_path):
    chains = {"operators.initial": ["gzip"], "operators.down": ["zstd", "lz4"], "operators.up": ["delta", "deflate"]}
    got = summary(tiny_recipe(chains), tmp_path / "run")
    assert got["adapter_sha256"] == undisturbed["adapter_sha256"]
    assert got["loss"] == undisturbed["loss"]
    assert got["cost"]["upload_bytes"] != undisturbed["cost"]["upload_bytes"] > 0


def test_quantised_runs_send_less_and_give_nearly_the_same(undisturbed, tiny_recipe, tmp_path, monkeypatch):
    """The peers' bug: int8 that matches no LoRA key, and upload bytes that are reported as 0."""
    seen = {"up": 0, "down": 0}
    assignment, outcome = wire.encode_assignment, wire.encode_outcome

    def counted(way: str, made: bytes) -> bytes:
        seen[way] += len(made)
        return made

    def asked(a: Assignment, **how: bool) -> bytes:
        assert [d["name"] for d in a.payload.coding["operators"]] == ["quantize"], a.kind  # evaluation's as well
        kinds.add(a.kind)
        return counted("down", assignment(a, **how))

    kinds: set[str] = set()
    monkeypatch.setattr(wire, "encode_assignment", asked)
    monkeypatch.setattr(wire, "encode_outcome", lambda o, **how: counted("up", outcome(o, **how)))
    got = summary(
        tiny_recipe({"operators.initial": [INT8], "operators.down": [INT8], "operators.up": ["delta", INT4]}),
        tmp_path / "run",
    )
    assert (got["cost"]["upload_bytes"], got["cost"]["download_bytes"]) == (seen["up"], seen["down"])
    assert got["adapter_sha256"] != undisturbed["adapter_sha256"]
    assert kinds == {"train", "evaluate"}
    fall = undisturbed["loss"]["before"] - undisturbed["loss"]["after"]
    assert fall > 0
    assert abs(got["loss"]["after"] - undisturbed["loss"]["after"]) < 0.2 * fall
    updates = [
        e["upload_bytes"] for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "client_update"
    ]
    assert len(updates) == 6 and min(updates) > 0


METHODS = {
    "lora": {"adapter": {"method": "lora", "rank": 8}}, "ia3": {"adapter": {"method": "ia3"}},
    "adalora": {"adapter": {"method": "adalora"}}, "prompt_tuning": {"adapter": {"method": "prompt_tuning"}},
    "prefix_tuning": {"adapter": {"method": "prefix_tuning"}}, "p_tuning": {"adapter": {"method": "p_tuning"}},
    "full": {"adapter": {"method": "full"}},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_quantisation_reaches_every_float_of_every_peft_method(method, tiny_recipe):
    recipe = tiny_recipe(METHODS[method])
    tensors = prepare(recipe, Watch()).model.adapter.tensors()
    tensors = {
        n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in tensors.items()
    }
    chain = Chains.of(tiny_recipe({"operators.up": [INT8]}).operators).up
    coded = chain.encode(Payload(tensors))
    sizes = [t.numel() for t in tensors.values()]
    assert coded.tensors["F32.codes"].numel() == sum(sizes)
    assert set(coded.tensors) == {"F32.codes", "F32.scales"}
    assert sum(t.nbytes for t in coded.tensors.values()) <= sum(sizes) * 1.01 + 2
    got = chain.decode(coded).tensors
    changed = [n for n, t in tensors.items() if not torch.equal(got[n], t)]
    assert len(changed) >= 0.9 * len(tensors)
    assert all(float((got[n] - t).norm()) < 0.05 * float(t.norm()) + 1e-3 for n, t in tensors.items())


@pytest.mark.parametrize("algorithm", ["fedkseed", "flora", "hetlora", "rolora", "scaffold", "fedsa_lora", "local"])
def test_every_kind_of_payload_passes_a_lossy_chain(algorithm, tiny_recipe, tmp_path):
    """Seeds and scalars, stacked factors, ranks of clients' own, one factor at a time, control variates, nothing at all."""
    up = ["delta", {"name": "quantize", "bits": 8, "error_feedback": True}, "deflate"]
    more = {"train.lr": 1e-3} if algorithm == "fedkseed" else {}
    recipe = tiny_recipe({"algorithm.name": algorithm, "operators.up": up, "operators.down": ["bf16", "deflate"],
                          "operators.initial": ["bf16"], "federation.rounds": 2, **more})  # fmt: skip
    got = summary(recipe, tmp_path / "run")
    assert not [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "client_failed"]
    assert got["rounds"] == 2


# ------------------------------------------------------------------ both sides hold the same


def ends(tiny_recipe, **operators) -> tuple[ServerChannel, ClientChannel]:
    chains = Chains.of(tiny_recipe({f"operators.{k}": v for k, v in operators.items()}).operators)
    return ServerChannel(chains, 42), ClientChannel(chains, 42)


def over_the_wire(assignment: Assignment) -> Assignment:
    return wire.decode_assignment(wire.encode_assignment(assignment))


def a_round(server: ServerChannel, client: ClientChannel, name: str, round: int, payload: Payload, answer: Payload):
    """(what the client got, what the server got)."""
    assignment = over_the_wire(server.encode(Assignment("train", name, round, 9, payload), False))
    got = client.decode(assignment)
    coded = wire.encode_outcome(Update(name, round, client.encode(answer, name, round)))
    return got, server.decode(wire.decode_outcome(coded))


def weights(seed: int, spread: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * spread for n, s in (("a", (8, 40)), ("b", (300,)))}


@pytest.mark.parametrize(
    "down", [[], ["zstd"], ["bf16"], [{"name": "quantize", "bits": 4, "rounding": "stochastic"}]], ids=str
)
def test_a_difference_is_against_what_the_client_decoded(tiny_recipe, down):
    server, client = ends(tiny_recipe, initial=down, down=down, up=["delta", "fp16"])
    for round in (1, 2):
        live = weights(round)
        got, _ = a_round(server, client, "a", round, Payload(live), Payload())
        answer = {n: t + 1e-3 for n, t in got.tensors.items()}
        got, outcome = a_round(server, client, "a", round, Payload(live), Payload(answer))
        assert isinstance(outcome, Update)
        for n, t in answer.items():  # fp16 of a difference of 1e-3: 1e-6. Against the server's own tensors: bf16's 4e-3
            assert float((outcome.payload.tensors[n] - t).abs().max()) < 2e-6
        assert same(got.tensors, live) == (down in ([], ["zstd"]))


@pytest.mark.parametrize("down", [[], ["zstd"], [{"name": "quantize", "rounding": "stochastic"}]], ids=str)
def test_a_reference_is_a_copy_and_is_held_once_for_all_clients(tiny_recipe, down):
    server, client = ends(tiny_recipe, down=down, initial=["bf16"] if down else [], up=["delta"])
    live = weights(0)
    sent = {n: over_the_wire(server.encode(Assignment("train", n, 1, 9, Payload(live)), False)) for n in "abc"}
    held = [server._references[n][1]["a"].data_ptr() for n in "abc"]
    assert len(set(held)) == 1
    for t in live.values():
        t.add_(1)
    for name in "cab":  # answered in another order, after the server's own tensors moved
        got = client.decode(sent[name])
        answer = {n: t * 1.5 for n, t in got.tensors.items()}
        outcome = server.decode(Update(name, 1, client.encode(Payload(answer), name, 1)))
        assert same(outcome.payload.tensors, answer)
    assert not any(server._references.values())


def test_a_late_answer_is_against_the_broadcast_of_its_own_round(tiny_recipe):
    server, client = ends(tiny_recipe, up=["delta", "fp16"])
    first = over_the_wire(server.encode(Assignment("train", "a", 1, 9, Payload(weights(1))), False))
    client.decode(first)
    answer = client.encode(Payload(weights(5)), "a", 1)
    server.encode(Assignment("train", "a", 2, 9, Payload(weights(2))), False)
    server.encode(Assignment("evaluate", "a", 1, 9, Payload(weights(3))), False)
    outcome = server.decode(Update("a", 1, answer))
    assert float((outcome.payload.tensors["b"] - weights(5)["b"]).abs().max()) < 4e-3
    again = server.decode(Update("a", 1, answer))
    assert isinstance(again, Failure) and again.reason == "bad_payload" and "no broadcast" in again.detail


def test_updates_are_plain_before_they_wait_anywhere(tiny_recipe, tmp_path):
    server, client = ends(tiny_recipe, up=["delta", INT4])
    for name in "ab":
        server.encode(Assignment("train", name, 1, 9, Payload(weights(1))), False)
    updates = {}
    for name in "ab":
        client.decode(Assignment("train", name, 1, 9, Payload(weights(1))))
        updates[name] = Update(name, 1, client.encode(Payload(weights(2), {"k": 1}), name, 1))
    expected = {name: server.chains.up.decode(u.payload, weights(1)).tensors for name, u in updates.items()}
    with pytest.raises(AssertionError, match="decoded before it is stored"):
        ClientOrder("ab", tmp_path).add(updates["b"])
    waiting = ClientOrder("ab", tmp_path)
    for name in "ba":
        waiting.add(server.decode(updates[name]))
    for name in "ab":
        outcome = waiting.next()
        assert isinstance(outcome, Update) and outcome.payload.meta == {"k": 1}
        assert same(outcome.payload.tensors, expected[name])


def test_the_first_payload_takes_another_chain_and_a_restart_remembers_who_had_it(tiny_recipe):
    server, _ = ends(tiny_recipe, initial=["fp16"], down=["bf16"])

    def chain(channel: ServerChannel, client: str, own_initial: bool = False) -> str:
        sent = channel.encode(Assignment("train", client, 1, 9, Payload(weights(0))), own_initial)
        return sent.payload.coding["operators"][0]["name"]

    assert [chain(server, c) for c in "aba"] == ["fp16", "fp16", "bf16"]
    again, _ = ends(tiny_recipe, initial=["fp16"], down=["bf16"])
    again.load_notes(json.loads(json.dumps(server.notes())))
    assert [chain(again, c) for c in "abc"] == ["bf16", "bf16", "fp16"]
    assert chain(again, "a", own_initial=True) == "fp16"  # an emulator that a restarted client gets again
    assert ends(tiny_recipe, initial=["bf16"], down=["bf16"])[0].notes() == {}


def test_clients_round_differently_and_a_broadcast_alike(tiny_recipe):
    stochastic = {"name": "quantize", "bits": 4, "rounding": "stochastic"}
    server, client = ends(tiny_recipe, initial=[stochastic], down=[stochastic], up=[stochastic])
    ups = [
        client.encode(Payload(weights(0)), *who).tensors["F32.codes"]
        for who in (("a", 1), ("b", 1), ("a", 2), ("a", 1))
    ]
    assert torch.equal(ups[0], ups[3]) and not torch.equal(ups[0], ups[1]) and not torch.equal(ups[0], ups[2])
    downs = [
        server.encode(Assignment("train", c, r, 9, Payload(weights(0))), False).payload.tensors["F32.codes"]
        for c, r in (("a", 1), ("b", 1), ("a", 2))
    ]
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])


# ------------------------------------------------------------------ failures are values


def test_an_update_that_cannot_be_decoded_is_a_failure_and_the_round_goes_on(tiny_recipe, tmp_path, monkeypatch):
    encoded = ClientChannel.encode

    def hostile(self, payload, client, round):
        coded = encoded(self, payload, client, round)
        if (client, round) == ("copy", 1):
            coded.tensors["F32.scales"][0] = 0x7FC0
        return coded

    monkeypatch.setattr(ClientChannel, "encode", hostile)
    run(tiny_recipe({"operators.up": [INT8]}), tmp_path / "run")
    failed = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "client_failed"]
    assert [(e["client"], e["round"], e["reason"]) for e in failed] == [("copy", 1, "bad_payload")]
    assert failed[0]["detail"] == "a scale of a quantised block is not finite, or below 0"


def test_an_assignment_that_cannot_be_decoded_and_an_update_that_cannot_be_encoded_fail_the_client(
    tiny_recipe, tmp_path, monkeypatch
):
    def broken(self, assignment, own_initial):
        return sent(self, assignment, own_initial) if assignment.client != "copy" else assignment

    sent, shared = ServerChannel.encode, Algorithm.shared_state

    def overflowing(self):
        payload = shared(self)
        return Payload({n: t * 1e30 for n, t in payload.tensors.items()}) if self.client == "last" else payload

    monkeypatch.setattr(ServerChannel, "encode", broken)
    monkeypatch.setattr(Algorithm, "shared_state", overflowing)
    run(
        tiny_recipe(
            {
                "operators.up": ["fp16"],
                "operators.down": ["bf16"],
                "operators.initial": ["bf16"],
                "federation.rounds": 1,
            }
        ),
        tmp_path / "run",
    )
    failed = {
        (e["client"], e["kind"]): (e["reason"], e["detail"])
        for e in read_events(tmp_path / "run" / "events.jsonl")
        if e["event"] == "client_failed"
    }
    assert failed["copy", "train"] == (
        "bad_payload",
        "the payload is not encoded by the recipe's operators, ['bf16']",
    )
    assert failed["last", "train"] == (
        "non_finite",
        "a number of the payload is over 65504, the largest of torch.float16: use bf16",
    )
    assert ("copy", "evaluate") in failed


def test_a_bad_chain_is_refused_before_anything_is_written(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match="did you mean quantize"):
        run(tiny_recipe({"operators.up": ["quantise"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ killed and resumed

CHAINS = {
    "operators.up": ["delta", {"name": "sparsify", "fraction": 0.3, "error_feedback": True}, {"name": "quantize", "bits": 4, "rounding": "stochastic"}],
    "operators.down": [{"name": "quantize", "bits": 8}], "operators.initial": ["bf16"], "federation.rounds": 3,
    "federation.clients_per_round": 2, "evaluation.every": 0,
}  # fmt: skip


class Killed(BaseException):
    """What nothing catches."""


def digest(recipe, folder: Path, monkeypatch, die_at: tuple[str, int] | None = None) -> str:
    """The adapter of a run; one that dies right after an event was written is resumed by other objects."""
    write = Events.write

    def dying(self, event, **fields):
        write(self, event, **fields)
        if (event, fields.get("round")) == die_at:
            raise Killed

    if die_at:
        with monkeypatch.context() as patch:
            patch.setattr(Events, "write", dying)
            with pytest.raises(Killed):
                run(recipe, folder)
    return run(recipe, folder, resume=die_at is not None).summary["adapter_sha256"]


def test_error_feedback_survives_a_kill(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(CHAINS)
    whole = digest(recipe, tmp_path / "whole", monkeypatch)
    assert list((tmp_path / "whole" / "clients").rglob("*.safetensors"))  # the residuals rest with the clients
    for number, moment in enumerate([("client_update", 3), ("checkpoint", 2), ("round_started", 1)]):
        assert digest(recipe, tmp_path / str(number), monkeypatch, moment) == whole, moment
    monkeypatch.setattr(ClientChannel, "resume", lambda self, state: None)
    assert digest(recipe, tmp_path / "forgetful", monkeypatch) != whole


def test_updates_in_flight_survive_a_kill_with_what_they_are_against(tiny_recipe, tmp_path, monkeypatch):
    """Asynchronous rounds: some updates wait in the checkpoint, encoded against broadcasts that the new process never sent."""
    recipe = tiny_recipe({**CHAINS, "algorithm": {"name": "fedbuff", "buffer": 1}, "federation.clients_per_round": 3})
    whole = digest(recipe, tmp_path / "whole", monkeypatch)
    assert digest(recipe, tmp_path / "killed", monkeypatch, ("checkpoint", 2)) == whole
    assert not [e for e in read_events(tmp_path / "killed" / "events.jsonl") if e["event"] == "client_failed"]


# ------------------------------------------------------------------ beside privacy, and with an emulator


def test_private_updates_are_differences_already(tiny_recipe, tmp_path):
    privacy = {"clip": 0.5, "noise": 1.0, "seeded": True}
    with pytest.raises(UserError, match="under privacy updates are already differences"):
        run(tiny_recipe({"operators.up": ["delta", INT8], "privacy": privacy}), tmp_path / "run")
    sparse = [{"name": "sparsify", "fraction": 0.5, "error_feedback": True}, INT8]
    run(tiny_recipe({"operators.up": sparse, "operators.down": [INT8], "privacy": privacy}), tmp_path / "run")
    assert not [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "client_failed"]


def test_a_wrapped_algorithm_says_what_the_one_inside_says(tiny_recipe):
    privacy = {"clip": 0.5, "noise": 1.0, "seeded": True}
    assert not prepare(tiny_recipe({"privacy": privacy}), Watch()).algorithm.own_initial
    assert prepare(tiny_recipe({"algorithm.name": "decomfl"}), Watch()).algorithm.own_initial


def test_an_emulator_travels_under_initial(tiny_recipe, tmp_path):
    """Its weights in 8 bits; the tokenizer's files, which travel as bytes, whole. Later payloads hold the adapter alone."""
    model = tiny.save_model(tmp_path / "model", tiny.causal_lm(num_hidden_layers=6, tie_word_embeddings=True))
    section = {"name": "fedot", "bottom": 1, "top": 1, "drop": 0.5, "reference": False}
    sizes, losses = {}, {}
    for name, initial in (("plain", []), ("int8", [INT8, "deflate"])):
        recipe = tiny_recipe({"model": str(model), "algorithm": section, "operators.initial": initial})
        got = summary(recipe, tmp_path / name)
        assert not [e for e in read_events(tmp_path / name / "events.jsonl") if e["event"] == "client_failed"]
        sizes[name], losses[name] = got["cost"]["download_bytes"], got["loss"]["after"]
    assert sizes["int8"] < 0.8 * sizes["plain"]
    assert losses["int8"] != losses["plain"] and abs(losses["int8"] - losses["plain"]) < 0.02 * losses["plain"]


def test_a_residual_never_leaves_the_client(tiny_recipe, tmp_path, monkeypatch):
    """What travels holds codes and scales alone; the residual is in the client's own file."""
    sent: list[Update] = []
    handle = Client.handle

    def watched(self, assignment):
        outcome = handle(self, assignment)
        if isinstance(outcome, Update) and assignment.kind == "train":
            sent.append(outcome)
        return outcome

    monkeypatch.setattr(Client, "handle", watched)
    run(tiny_recipe({"operators.up": [INT4]}), tmp_path / "run")
    assert {frozenset(u.payload.tensors) for u in sent} == {frozenset({"F32.codes", "F32.scales"})}
    from fedloom.federation.record.checkpoints import ClientStore

    kept = ClientStore(tmp_path / "run" / "clients").load("copy", 2)["operators"].tensors
    assert kept and all(t.dtype == torch.float32 for t in kept.values())


# ------------------------------------------------------------------ a reference is the broadcast of its round, in every tensor


@pytest.mark.parametrize("changed", ["a", "b"])
def test_a_reference_is_taken_anew_where_only_one_tensor_changed(tiny_recipe, changed):
    """The other one is the same in every bit, as where one factor of LoRA rests for a round."""
    server, client = ends(tiny_recipe, up=["delta"])
    live = weights(0)
    a_round(server, client, "x", 1, Payload({n: t.clone() for n, t in live.items()}), Payload(weights(1)))
    live[changed][0] += 1
    got, outcome = a_round(server, client, "x", 2, Payload(live), Payload(answer := weights(2)))
    assert same(got.tensors, live)
    assert isinstance(outcome, Update) and same(outcome.payload.tensors, answer)


@pytest.mark.parametrize(
    "after",
    [
        {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2)},  # -0 → 0
        {"a": torch.tensor([1.0, -0.0])},  # a name less
        {"a": torch.tensor([1.0, -0.0]), "b": torch.zeros(2), "c": torch.ones(1)},  # a name more
        {"a": torch.tensor([1.0, -0.0]), "b": torch.zeros(1, 2)},  # another shape
        {"a": torch.tensor([1.0, -0.0]), "b": torch.zeros(2, dtype=torch.int32)},  # another type, the same bits
    ],
    ids=["sign", "less", "more", "shape", "dtype"],
)
def test_what_is_held_is_held_again_only_where_every_bit_is_the_same(tiny_recipe, after):
    server, _ = ends(tiny_recipe, up=["delta"])
    before = {"a": torch.tensor([1.0, -0.0]), "b": torch.zeros(2)}
    first = server._copy_broadcast(before)
    assert server._copy_broadcast({n: t.clone() for n, t in before.items()}) is first
    again = server._copy_broadcast(after)
    assert again is not first and same(again, after)
    nan = {"a": torch.tensor([float("nan")])}
    assert server._copy_broadcast(nan) is server._copy_broadcast({"a": nan["a"].clone()})


def test_the_last_four_broadcasts_of_a_client_are_held(tiny_recipe):
    server, client = ends(tiny_recipe, up=["delta"])
    answers = {}
    for round in range(1, 7):
        client.decode(server.encode(Assignment("train", "a", round, 9, Payload(weights(round))), False))
        answers[round] = client.encode(Payload(weights(10 + round)), "a", round)
    got = {round: server.decode(Update("a", round, payload)) for round, payload in answers.items()}
    assert [round for round, outcome in got.items() if isinstance(outcome, Failure)] == [1, 2]
    assert all(same(got[round].payload.tensors, weights(10 + round)) for round in (3, 4, 5, 6))


def test_a_failure_passes_as_it_is_and_keeps_its_cost(tiny_recipe):
    server, client = ends(tiny_recipe, up=["delta"])
    failure = Failure("a", 1, "odd", "as asked")
    assert server.decode(failure) is failure
    client.decode(server.encode(Assignment("train", "a", 1, 9, Payload(weights(1))), False))
    coded = client.encode(Payload(weights(2)), "a", 1)
    del coded.tensors[next(iter(coded.tensors))]
    refused = server.decode(Update("a", 1, coded, cost=Cost(upload_bytes=5)))
    assert isinstance(refused, Failure)
    assert (refused.reason, refused.client, refused.round, refused.cost.upload_bytes) == ("bad_payload", "a", 1, 5)
