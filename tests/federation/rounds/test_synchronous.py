"""Synchronous rounds: order, virtual deadlines, and who is asked again below quorum. Clients are a list of outcomes."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedloom.common.errors import RunFailed
from fedloom.federation.rounds import synchronous as module
from fedloom.federation.rounds.schedule import ATTEMPTS, Schedule
from fedloom.federation.rounds.synchronous import PAUSE, SynchronousRounds
from fedloom.federation.runtime import Capabilities
from fedloom.messages.types import Failure, Payload, Update
from fedloom.recipe.recipe import FederationConfig


class Clock:
    def __init__(self):
        self.now = 0.0
        self.slept = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


class Sender:
    """Answers from a table: client → what it says the first time it is asked, the second, … (the last one for ever).

    `reason` is a failure's; None is an update. `order` is the order in which answers arrive.
    """

    def __init__(self, answers: dict[str, list[str | None]], order: str | None = None):
        self.answers = {client: list(reasons) for client, reasons in answers.items()}
        self.order, self.asked, self.told = order, [], []
        self.virtual_time: Any = None
        self.runtime = SimpleNamespace(capabilities=Capabilities())

    def outcomes(self, kind, round, clients, dataset="test"):
        self.asked.append("".join(clients))
        for client in sorted(clients, key=(self.order or "".join(clients)).index):
            reasons = self.answers[client]
            reason = reasons.pop(0) if len(reasons) > 1 else reasons[0]
            if reason is None:
                yield Update(client, round, Payload({"w": torch.full((2,), float(ord(client)))}), num_examples=1)
            else:
                yield Failure(client, round, reason, "as asked")

    def failed(self, failure, kind):
        self.told.append((failure.client, failure.reason, kind))


def rounds(
    tmp_path, sender: Any, clients: str, fewest: int = 1, waits: float = 0.0, timed: Any = None
) -> SynchronousRounds:
    sender.virtual_time, sender.runtime = timed, SimpleNamespace(capabilities=Capabilities(virtual=timed is not None))
    federation = FederationConfig(min_clients=fewest, round_deadline=waits or None)
    return SynchronousRounds(sender, Schedule(tuple(clients), (), federation, 1, 0, 0), tmp_path / "early")


def gathered(source: SynchronousRounds, round: int = 1) -> list[tuple[str, str | None]]:
    """(client, reason of its failure) of all outcomes of a round, in the order in which the coordinator sees them."""
    seen = []

    def accept(outcome):
        seen.append((outcome.client, getattr(outcome, "reason", None)))
        return outcome if isinstance(outcome, Update) else None

    source.begin(round)
    with suppress(RunFailed):  # below quorum, once all is seen
        for update in source.updates(accept):
            assert torch.equal(update.payload.tensors["w"], torch.full((2,), float(ord(update.client))))
    return seen


@pytest.mark.parametrize("refused", [True, False])
def test_a_round_below_quorum_ends_with_an_error_whoever_is_missing(tmp_path, clock, refused):
    """What is refused does not count, though it arrived."""
    source = rounds(tmp_path, Sender({"a": [None], "b": [None if refused else "odd"]}), "ab", fewest=2)
    source.begin(3)
    with pytest.raises(RunFailed, match=r"^round 3 got 1 usable updates and needs 2 .*: 2 finished rounds are kept$"):
        list(source.updates(lambda outcome: outcome if outcome.client == "a" else None))
    assert list((tmp_path / "early").iterdir()) == []


def test_updates_come_in_client_order_whatever_order_they_arrive_in(tmp_path, clock):
    sender = Sender({"a": [None], "b": ["odd"], "c": [None], "d": [None]}, order="dbca")
    at_once = rounds(tmp_path, sender, "abcd")
    assert at_once.begin(1) == list("abcd")
    assert gathered(at_once) == [("a", None), ("b", "odd"), ("c", None), ("d", None)]
    assert sender.asked == ["abcd"]
    assert list((tmp_path / "early").iterdir()) == []
    assert (at_once.now, at_once.notes(), at_once.files(), clock.slept) == (None, {"now": None}, {}, [])
    assert at_once.about(Update("a", 1, Payload())) == {"staleness": 0, "arrived": None}


# ------------------------------------------------------------------ below quorum, in real time


@pytest.mark.parametrize("reason", ["lost", "crashed", "late", "absent"])
def test_below_quorum_those_that_were_lost_are_asked_again_until_they_are_back(tmp_path, clock, reason):
    sender = Sender({"a": [reason, reason, None], "b": [None]})
    assert gathered(rounds(tmp_path, sender, "ab", fewest=2, waits=10.0)) == [("a", None), ("b", None)]
    assert sender.asked == ["ab", "a", "a"]
    assert sender.told == [("a", reason, "train")], "said once"
    assert clock.slept == [PAUSE, PAUSE] == [1.0, 1.0]


def test_at_quorum_nobody_is_asked_again(tmp_path, clock):
    sender = Sender({"a": ["lost", None], "b": [None], "c": ["lost", None]})
    assert gathered(rounds(tmp_path, sender, "abc", fewest=1, waits=10.0)) == [
        ("a", "lost"),
        ("b", None),
        ("c", "lost"),
    ]
    assert (sender.asked, sender.told, clock.slept) == (["abc"], [], [])


def test_nobody_behind_a_lost_client_waits_for_it_once_there_are_enough(tmp_path, clock):
    """a is lost, b makes the quorum: a's failure is handed on at once, before c has answered."""
    sender = Sender({"a": ["lost"], "b": [None], "c": [None]})
    at_once = rounds(tmp_path, sender, "abc", fewest=1, waits=10.0)
    at_once.begin(1)
    arriving = at_once._outcomes()
    assert [next(arriving).client for _ in range(2)] == ["a", "b"]
    assert [o.client for o in arriving] == ["c"]


@pytest.mark.parametrize("reason", ["non_finite", "bad_payload", "vanished"])
def test_other_failures_are_not_asked_again(tmp_path, clock, reason):
    sender = Sender({"a": [reason, None], "b": [None]})
    assert gathered(rounds(tmp_path, sender, "ab", fewest=2, waits=10.0)) == [("a", reason), ("b", None)]
    assert sender.asked == ["ab"]


@pytest.mark.parametrize(("waits", "times"), [(0.0, 1), (0.9, 1), (1.0, 2), (3.5, 4)])
def test_they_are_asked_until_the_round_s_real_deadline(tmp_path, clock, waits, times):
    """Once at the start, and again after each second that still ends within the deadline."""
    sender = Sender({"a": ["lost"], "b": [None]})
    assert gathered(rounds(tmp_path, sender, "ab", fewest=2, waits=waits)) == [("a", "lost"), ("b", None)]
    assert len(sender.asked) == times
    assert len(sender.told) == (1 if times > 1 else 0)


def test_of_several_that_were_lost_only_those_that_still_are_are_asked(tmp_path, clock):
    sender = Sender({"a": ["lost", None], "b": ["absent", "lost", None], "c": ["odd"]})
    assert gathered(rounds(tmp_path, sender, "abc", fewest=2, waits=9.0)) == [("a", None), ("b", None), ("c", "odd")]
    assert sender.asked == ["abc", "ab", "b"]
    assert sender.told == [("a", "lost", "train"), ("b", "absent", "train")]


# ------------------------------------------------------------------ virtual time


def timed(seconds: dict[str, float], deadline: float | None = None) -> Any:
    return SimpleNamespace(took=seconds.__getitem__, deadline=deadline)


def test_a_round_ends_with_the_last_update_and_the_next_begins_there(tmp_path, clock):
    sender = Sender({"a": [None], "b": [None], "c": [None]})
    at_once = rounds(tmp_path, sender, "abc", timed=timed({"a": 1.0, "b": 4.12349, "c": 2.0}))
    assert at_once.now == 0.0
    gathered(at_once)
    assert at_once.now == 4.12349
    arrived = [at_once.about(Update(c, 1, Payload()))["arrived"] for c in "abc"]
    assert arrived == [1.0, 4.123, 2.0]
    gathered(at_once, 2)
    assert at_once.now == pytest.approx(8.24698)
    assert at_once.about(Update("a", 2, Payload())) == {"staleness": 0, "arrived": 5.123}
    again = rounds(tmp_path, sender, "abc", timed=timed({"a": 1.0, "b": 2.0, "c": 3.0}))
    again.load(at_once.notes(), {})
    gathered(again, 3)
    assert again.now == pytest.approx(11.24698)
    plain = rounds(tmp_path, sender, "abc")
    plain.load({"now": 3.0}, {})
    assert plain.now is None


def test_an_update_after_the_virtual_deadline_is_dropped_and_the_round_ends_there(tmp_path, clock):
    sender = Sender({"a": [None], "b": [None], "c": [None], "d": ["odd"]})
    at_once = rounds(tmp_path, sender, "abcd", timed=timed({"a": 1.0, "b": 5.0, "c": 5.01, "d": 0.0}, 5.0))
    assert gathered(at_once) == [("a", None), ("b", None), ("c", "too_late"), ("d", "odd")]
    assert at_once.now == 5.0
    assert at_once.about(Update("c", 1, Payload()))["arrived"] == 5.0


def test_what_is_said_of_an_update_that_is_too_late(tmp_path, clock):
    at_once = rounds(tmp_path, Sender({"a": [None]}), "a", timed=timed({"a": 12.3456789}, 5.0))
    at_once.begin(1)
    late = at_once._in_time(next(at_once._outcomes()))
    assert isinstance(late, Failure)
    assert late.detail == "12.35 virtual seconds, and devices.deadline is 5"


def test_devices_that_vanished_are_asked_again_at_once_and_not_for_ever(tmp_path, clock):
    sender = Sender({"a": ["vanished", "vanished", None], "b": ["lost", None]})
    at_once = rounds(tmp_path, sender, "ab", fewest=2, timed=timed({"a": 1.0, "b": 1.0}))
    assert gathered(at_once) == [("a", None), ("b", "lost")]
    assert (sender.asked, sender.told, clock.slept) == (["ab", "a", "a"], [], [])
    never = Sender({"a": ["vanished"], "b": [None]})
    at_once = rounds(tmp_path, never, "ab", fewest=2, timed=timed({"a": 0.0, "b": 1.0}))
    assert gathered(at_once) == [("a", "vanished"), ("b", None)]
    assert len(never.asked) == ATTEMPTS == 1000


@pytest.mark.parametrize("fewest", [1, 2])
def test_exactly_as_many_usable_updates_as_are_needed_are_enough(tmp_path, clock, fewest):
    """Three came, of which the server takes two."""
    source = rounds(tmp_path, Sender({"a": [None], "b": [None], "c": [None]}), "abc", fewest=fewest)
    source.begin(1)
    taken = source.updates(lambda outcome: None if outcome.client == "b" else outcome)
    assert [update.client for update in taken] == ["a", "c"]
