"""Virtual time: how long work would have taken, for which messages, and what a lost device costs."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedloom.common.randomness import numpy_generator
from fedloom.federation.rounds.dispatcher import Dispatcher, Terms
from fedloom.federation.rounds.virtual_time import SECONDS_PER_TOKEN, Speeds, VirtualTime, tensor_bytes
from fedloom.messages.types import Assignment, Cost, Failure, Payload, Update


class Pace:
    """Ten seconds a client's letter, and a byte more for each byte; `gone` is (client, round, attempt) of lost devices."""

    deadline = 7.5

    def __init__(self, gone=()):
        self.gone, self.heard, self.asked = set(gone), [], []

    def seconds(self, client, cost, down, up):
        self.heard.append((client, cost.train_tokens, down, up))
        return 10.0 * (ord(client) - ord("a") + 1)

    def vanishes(self, client, round, attempt):
        self.asked.append((client, round, attempt))
        return (client, round, attempt) in self.gone


class Runtime:
    """Does the work at once. `fails` are clients that answer with a failure."""

    def __init__(self, fails=()):
        self.fails, self.sent = set(fails), []

    def run(self, assignments):
        for assignment in assignments:
            if assignment is None:
                continue
            self.sent.append((assignment.kind, assignment.client, assignment.round))
            client, round, cost = assignment.client, assignment.round, Cost(train_tokens=5)
            if client in self.fails:
                yield Failure(client, round, "test", "as asked", cost)
            else:
                yield Update(client, round, Payload({"w": torch.zeros(3, dtype=torch.float64)}), cost=cost)


class Timed:
    """A dispatcher in virtual time in front of a runtime. It is handed its assignments."""

    def __init__(self, runtime: Any, pace: Any):
        time = VirtualTime(pace)
        channel: Any = SimpleNamespace(decode=lambda outcome: outcome)
        terms = Terms({}, 9, None, score=False)
        self.took, self.deadline = time.took, time.deadline
        self.dispatcher = Dispatcher(None, runtime, terms, channel, None, lambda *told: None, time)

    def run(self, assignments):
        return self.dispatcher.received(assignments, "train")


def work(client, round=1, kind="train"):
    return Assignment(kind, client, round, 9, Payload({"w": torch.zeros(2), "b": torch.zeros(5, dtype=torch.int8)}))


def test_training_takes_the_pace_s_seconds_for_the_bytes_of_both_ways():
    pace, runtime = Pace(), Runtime(fails="b")
    timed = Timed(runtime, pace)
    outcomes = list(timed.run([work("c"), None, work("a"), work("b"), work("a", kind="evaluate")]))
    assert [(o.client, type(o)) for o in outcomes] == [("c", Update), ("a", Update), ("b", Failure), ("a", Update)]
    assert pace.heard == [("c", 5, 13, 24), ("a", 5, 13, 24)], "neither a failure nor an evaluation takes time"
    assert [timed.took(client) for client in "cab"] == [30.0, 10.0, 0.0]
    with pytest.raises(KeyError):
        timed.took("a")  # once
    assert pace.asked == [("c", 1, 0), ("a", 1, 0), ("b", 1, 0)], "a client is not lost while it is measured"


def test_an_evaluation_leaves_the_seconds_of_training_as_they_were():
    timed = Timed(Runtime(), Pace())
    list(timed.run([work("b")]))
    list(timed.run([work("b", kind="evaluate")]))
    assert timed.took("b") == 20.0


def test_a_device_that_is_lost_is_sent_nothing_and_those_behind_it_are():
    pace, runtime = Pace({("a", 1, 0), ("b", 1, 0), ("b", 1, 1), ("b", 2, 0)}), Runtime()
    timed = Timed(runtime, pace)
    outcomes = list(timed.run([work(c) for c in "cabc"]))
    assert [(o.client, getattr(o, "reason", None)) for o in outcomes] == [
        ("c", None), ("a", "vanished"), ("b", "vanished"), ("c", None),
    ]  # fmt: skip
    assert runtime.sent == [("train", "c", 1), ("train", "c", 1)]
    assert [timed.took(client) for client in "abc"] == [0.0, 0.0, 30.0]
    # asked again in the same round, the attempts go on; in another round they begin anew
    again = list(timed.run([work("a"), work("b")])) + list(timed.run([work("b")])) + list(timed.run([work("b", 2)]))
    assert [(o.client, o.round, getattr(o, "reason", None)) for o in again] == [
        ("a", 1, None), ("b", 1, "vanished"), ("b", 1, None), ("b", 2, "vanished"),
    ]  # fmt: skip
    assert pace.asked[4:] == [("a", 1, 1), ("b", 1, 1), ("b", 1, 2), ("b", 2, 0)]
    assert again[1].detail == "its device was lost in the middle of the work"


def test_the_deadline_is_the_pace_s():
    assert Timed(Runtime(), Pace()).deadline == 7.5


def test_bytes_are_those_of_tensors_as_they_travel():
    assert tensor_bytes(Payload()) == 0
    mixed = {
        "a": torch.zeros(3, 4, dtype=torch.bfloat16),
        "b": torch.zeros(5),
        "c": torch.zeros(0),
        "d": torch.ones(()),
    }
    assert tensor_bytes(Payload(mixed, {"note": "x" * 100})) == 24 + 20 + 0 + 4


def test_speeds_are_tokens_times_a_factor_of_the_client_s_own():
    z = float(numpy_generator(3, "arrival", 0, "a").standard_normal())
    pace = Speeds(3, 0.5)
    assert pace.seconds("a", Cost(train_tokens=2000, steps=9), 1, 2) == pytest.approx(
        2000 * SECONDS_PER_TOKEN * math.exp(0.5 * z)
    )
    assert pace.seconds("a", Cost(), 1, 2) == 0.0
    assert pace.deadline is None
    assert pace.vanishes("a", 1, 0) is False
    assert SECONDS_PER_TOKEN == 1e-3
