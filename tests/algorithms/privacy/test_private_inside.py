"""What the wrapper hands on to the algorithm inside, and what it keeps to itself. The algorithm is a recorder."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.algorithms.privacy.private import CLIP, WITHIN, Private
from fedloom.common.errors import ClientFailed
from fedloom.messages.types import Payload, Update
from fedloom.models.layout import Adapter
from fedloom.recipe.privacy import PrivacyConfig
from fedloom.recipe.recipe import AdapterConfig

START = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}


class Recorder(FedAvg):
    """FedAvg over `START` that notes which hooks were called and with what."""

    def __init__(self) -> None:
        super().__init__(FedAvg.Options(), 0, AdapterConfig())
        self.calls: list[tuple[Any, ...]] = []
        self.shared = Adapter.of(START)
        self.sends = Payload({n: t + 3.0 for n, t in START.items()})

    def before_step(self, model):
        self.calls.append(("before_step", model))

    def after_step(self, model):
        self.calls.append(("after_step", model))

    def server_step(self):
        self.calls.append(("server_step",))

    def local_training(self, run):
        self.calls.append(("local_training", run))
        return "result"

    def local_loss(self, model, batch, step_units):
        self.calls.append(("local_loss", model, batch, step_units))
        return "loss"

    def receive(self, payload):
        self.calls.append(("receive", sorted(payload.tensors), self.evaluating))

    def shared_state(self):
        return self.sends

    def begin(self, client, round, kept):
        self.calls.append(("begin", client, round, kept, self.evaluating))

    def deployed(self, client=None):
        return ("deployed", client)

    def left_server(self):
        return {"left": 1}

    def compared_with(self):
        return {"compared": 1}

    def client_state(self):
        return Payload({"own": torch.ones(1)})


def private(**values: Any) -> Private:
    config = PrivacyConfig(**{"noise": 0.0, "clip": 2.0, "seeded": True, "delta": 1e-5, "population": 10, **values})
    made = Private(Recorder(), config, 5)
    made.shared = made.inner.shared
    return made


def sent(clip: float = 2.0) -> Payload:
    return Payload({**{n: t.clone() for n, t in START.items()}, CLIP: torch.tensor(clip, dtype=torch.float64)})


def test_every_hook_reaches_the_algorithm_inside():
    made = private()
    made.evaluating = True
    made.begin("c", 4, kept := Payload({}, {"k": 1}))
    made.before_step("model")
    made.after_step("model")
    made.server_step()
    assert made.local_training("run") == "result"
    assert made.local_loss("model", "batch", 7) == "loss"
    made.receive(sent())
    assert made.inner.calls == [
        ("begin", "c", 4, kept, True), ("before_step", "model"), ("after_step", "model"), ("server_step",),
        ("local_training", "run"), ("local_loss", "model", "batch", 7), ("receive", ["a", "b"], True),
    ]  # fmt: skip
    assert (made.deployed("c"), made.deployed()) == (("deployed", "c"), ("deployed", None))
    assert (made.left_server(), made.compared_with()) == ({"left": 1}, {"compared": 1})
    assert set(made.client_state().tensors) == {"own"}
    assert (made.client, made.round) == ("c", 4)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf, math.nan])
def test_a_clip_that_tells_nothing_is_refused(clip):
    with pytest.raises(ClientFailed, match="has no clip"):
        private().receive(sent(clip))


def test_a_message_without_a_clip_is_refused():
    with pytest.raises(ClientFailed, match="has no clip") as caught:
        private().receive(Payload(dict(START)))
    assert caught.value.reason == "bad_payload"


def test_the_change_against_what_was_received_is_clipped_to_what_the_server_said():
    """A change of 3 in each of three numbers has the norm √27; the client's own clip was another one."""
    made = private(clip=100.0)
    made.begin("c", 1, None)
    made.receive(payload := sent(clip=1.5))
    for tensor in payload.tensors.values():
        tensor.zero_()  # the model trains on in the same memory
    got = made.shared_state()
    assert set(got.tensors) == {"a", "b"} and not got.meta
    flat = torch.cat([t.flatten() for t in got.tensors.values()])
    assert flat.tolist() == pytest.approx([1.5 / math.sqrt(3)] * 3)
    assert got.tensors["b"].shape == (1, 1) and got.tensors["a"].dtype == torch.float32
    made.receive(sent(clip=math.sqrt(27) + 1e-6))
    assert made.shared_state().tensors["a"].tolist() == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize(("clip", "bit"), [(6.0, 0.5), (5.0, -0.5)])
def test_where_the_clip_adapts_one_bit_tells_whether_the_change_was_within(clip, bit):
    made = private(adaptive={})
    made.begin("c", 1, None)
    made.receive(sent(clip))
    assert float(made.shared_state().tensors[WITHIN]) == bit


@pytest.mark.parametrize(
    ("sends", "sentence"),
    [
        (Payload({**START, "more": torch.ones(1)}), "more would leave the client unclipped"),
        (Payload({"a": torch.ones(3), "b": START["b"]}), "a would leave the client unclipped"),
        (Payload(dict(START), {"k": 1}), "metadata would leave the client unclipped"),
    ],
)
def test_nothing_leaves_that_was_not_received(sends, sentence):
    made = private()
    made.begin("c", 1, None)
    made.receive(sent())
    made.inner.sends = sends
    with pytest.raises(ValueError, match=sentence):
        made.shared_state()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_does_not_leave(value):
    made = private()
    made.begin("c", 1, None)
    made.receive(sent())
    made.inner.sends = Payload({"a": torch.tensor([1.0, value]), "b": START["b"]})
    with pytest.raises(ClientFailed, match="not finite") as caught:
        made.shared_state()
    assert caught.value.reason == "non_finite"


@pytest.mark.parametrize(("vote", "counted"), [(0.5, 0.5), (-0.5, -0.5), (40.0, 0.5), (-40.0, -0.5), (0.25, 0.25)])
def test_nobody_has_more_than_one_vote(vote, counted):
    payload = Payload({WITHIN: torch.tensor(vote)})
    assert private(adaptive={})._bit(payload) == counted
    assert private()._bit(payload) == 0.0


def test_the_mean_is_over_the_clients_that_were_expected():
    """Two of five came, each with a change of (2, 0, 0), which is as long as the clip."""
    made = private()
    change = Payload({"a": torch.tensor([2.0, 0.0]), "b": torch.zeros(1, 1)})
    update = Update("c", 1, change, num_examples=1)
    made.accept(update)
    metrics = made.aggregate(iter([update, replace(update, client="d", num_examples=99)]))
    assert made.shared.tensors()["a"].tolist() == pytest.approx([1.0 + 2 * 2 / 5, 2.0])
    assert (metrics["clip"], metrics["median_norm"], metrics["distance_moved"]) == (2.0, 2.0, pytest.approx(0.8))


def test_what_is_told_of_the_budget_depends_on_where_the_noise_is():
    update = Update("c", 1, Payload({n: torch.zeros_like(t) for n, t in START.items()}), num_examples=1)
    told = {}
    for where in ("server", "client"):
        made = private(noise=2.0, where=where)
        told[where] = made.aggregate(iter([update]))
    assert {"epsilon", "delta"} <= told["server"].keys() and "epsilon_models" not in told["server"]
    assert {"epsilon", "delta", "epsilon_models"} <= told["client"].keys()
    assert "median_norm" not in told["server"] | told["client"]
    assert {"epsilon", "epsilon_models"}.isdisjoint(private().aggregate(iter([update])))
