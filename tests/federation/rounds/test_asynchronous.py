"""Rounds without a barrier: slots, versions, virtual and real order of arrival, failures. Clients do nothing but answer."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedloom.common.errors import RunFailed
from fedloom.federation.rounds.asynchronous import AsynchronousRounds
from fedloom.federation.rounds.dispatcher import Dispatcher, Terms
from fedloom.federation.rounds.schedule import Sampling, Schedule
from fedloom.federation.rounds.virtual_time import Speeds, VirtualTime
from fedloom.federation.runtime import Capabilities
from fedloom.messages.types import Assignment, Cost, Failure, Payload, Update
from fedloom.recipe.recipe import FederationConfig


class Durations:
    """A pace that takes each client's seconds from a table, or from a function of client and how often it was asked."""

    def __init__(self, seconds):
        self.seconds_of, self.times, self.deadline = seconds, Counter(), None

    def seconds(self, client, cost, down, up):
        self.times[client] += 1
        return self.seconds_of(client, self.times[client]) if callable(self.seconds_of) else self.seconds_of[client]

    def vanishes(self, client, round, attempt):
        return False


class Answers:
    """A virtual runtime whose clients answer at once; `fails` names (client, round) that do not. Counts what is sent."""

    capabilities = Capabilities(virtual=True)

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


def in_flight(
    folder: Path, runtime: Any, clients: str, slots: int, buffer: int, pace: Any, seed: int = 0
) -> AsynchronousRounds:
    algorithm: Any = SimpleNamespace(
        own_initial=False, initial_payload=lambda client: Payload(), round_payload=lambda client: Payload()
    )
    channel: Any = SimpleNamespace(encode=lambda assignment, own: assignment, decode=lambda outcome: outcome)
    terms, virtual = Terms({}, 9, 1, score=False), VirtualTime(pace) if pace else None
    dispatcher = Dispatcher(algorithm, runtime, terms, channel, None, lambda *told: None, virtual)
    return AsynchronousRounds(dispatcher, schedule(clients, slots, seed), buffer, folder / "in-flight")


def play(flight: AsynchronousRounds, round: int) -> list[tuple[str, int, float]]:
    """(client, staleness, virtual time) of each outcome of a round, in order of arrival; failures among them."""
    seen = []

    def accept(outcome):
        told = flight.about(outcome)
        seen.append((outcome.client, told["staleness"], told["arrived"]))
        if not isinstance(outcome, Update):
            return None
        assert torch.equal(outcome.payload.tensors["w"], torch.full((2,), float(outcome.round)))
        return outcome

    flight.begin(round)
    list(flight.updates(accept))
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
    assert flight.now == 6.0


@pytest.mark.parametrize("seed", range(8))
def test_slots_are_filled_a_client_is_asked_once_a_version_and_nothing_is_lost(tmp_path, seed):
    draw = random.Random(seed)
    slots, buffer = draw.choice([(4, 2), (3, 3), (2, 1), (7, 4)])
    runtime = Answers({(c, r) for c in "abcdefg" for r in range(1, 9) if draw.random() < 0.15})
    pace = Durations(lambda client, round: random.Random(f"{seed}{client}{round}").expovariate(1.0))
    flight = in_flight(tmp_path, runtime, "abcdefg", slots, buffer, pace, seed)
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
    pace, cost = Speeds(3, 0.5), Cost(train_tokens=2000)
    own = pace.seconds("a", cost, 0, 0)
    assert own == Speeds(3, 0.5).seconds("a", cost, 7, 7) != pace.seconds("b", cost, 0, 0)
    assert pace.seconds("a", replace(cost, wall_seconds=9.0, upload_bytes=5), 0, 0) == own
    assert pace.seconds("a", Cost(train_tokens=6000), 0, 0) == pytest.approx(3 * own)
    assert Speeds(3, 0.0).seconds("a", cost, 0, 0) == 2.0
    logs = torch.tensor([pace.seconds(f"client-{k}", cost, 0, 0) / 2.0 for k in range(2000)]).log()
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
    assert flight.now is None


def test_it_begins_where_as_many_are_there_as_a_round_needs(tmp_path):
    """And asks those that vanished again until there are; each is told of once."""
    durations = Durations(dict.fromkeys("abc", 1.0))
    durations.vanishes = lambda client, round, attempt: client in "ab" and attempt < 3
    runtime = Answers()
    flight = in_flight(tmp_path, runtime, "abc", 3, 2, durations)
    federation = FederationConfig(clients_per_round=3, min_clients=2)
    there = lambda round, attempt: frozenset("abc" if attempt else "a")  # noqa: E731
    flight._schedule = replace(flight._schedule, federation=federation, sampling=Sampling(there=there))
    assert flight.begin(1) == ["a", "b", "c"]
    told = []

    def accept(outcome):
        told.append((outcome.client, type(outcome)))
        return outcome if isinstance(outcome, Update) else None

    assert len(list(flight.updates(accept))) == 2
    assert {kind for _, kind in told} == {Update}
    told.clear()
    durations.vanishes = lambda client, round, attempt: client in "ab"
    never = in_flight(tmp_path / "never", Answers(), "abc", 3, 2, durations)
    never._schedule = replace(never._schedule, federation=federation)
    never.begin(1)
    with pytest.raises(RunFailed, match=r"round 1 got 1 usable updates and needs 2 \(federation.min_clients\): 0 fin"):
        list(never.updates(accept))
    assert sorted(told, key=str) == [("a", Failure), ("b", Failure), ("c", Update)]


def test_a_reply_that_was_not_asked_for_or_names_another_round_is_refused_and_blocks_no_slot(tmp_path):
    stray = Update("z", 1, Payload({"w": torch.zeros(2)}))
    wrong = LastFirst(lambda o: [stray, replace(o, round=o.round + 1) if o.client == "a" else o])
    flight = in_flight(tmp_path, wrong, "ab", 2, 2, None)
    outcomes = []

    def accept(outcome):
        outcomes.append(outcome)
        return outcome if isinstance(outcome, Update) else None

    for round in (1, 2):
        flight.begin(round)
        assert [u.client for u in flight.updates(accept)] == ["b"]
    reasons = Counter((o.client, o.round, o.reason) for o in outcomes if isinstance(o, Failure))
    assert reasons[("a", 1, "bad_payload")] == reasons[("a", 2, "bad_payload")] == 1
    assert reasons[("z", 1, "unexpected")] == 4
