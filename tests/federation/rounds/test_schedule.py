"""Who trains in which round and when is measured: counts, order, reachability, and what cannot succeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.common import registry
from fedloom.common.errors import RunFailed
from fedloom.data.corpus import Partition, Shard
from fedloom.federation.rounds.schedule import ATTEMPTS, Sampling, Schedule, make_schedule
from fedloom.recipe.recipe import FederationConfig, Recipe

CLIENTS = tuple("abcdefgh")


def schedule(count: int | float | None = 3, **values: Any) -> Schedule:
    federation = FederationConfig(clients_per_round=count, rounds=7, **values.pop("federation", {}))
    drawn = {key: values.pop(key) for key in ("independent", "secret", "there") if key in values}
    every, seed = values.pop("every", 0), values.pop("seed", 1)
    return Schedule(CLIENTS, ("a", "b"), federation, 1, every, seed, sampling=Sampling(**drawn), **values)


def test_a_sample_has_so_many_clients_in_their_fixed_order():
    plan = schedule()
    samples = [plan.sample(r) for r in range(1, 30)]
    assert {len(set(s)) for s in samples} == {3}
    assert all(list(s) == sorted(s) for s in samples)
    assert len(set(samples)) > 10 and set().union(*samples) == set(CLIENTS)
    assert samples == [schedule().sample(r) for r in range(1, 30)]
    assert samples != [schedule(seed=2).sample(r) for r in range(1, 30)]
    assert schedule(None).sample(1) == CLIENTS == schedule(8).sample(2)


def test_an_independent_sample_takes_each_client_with_its_own_coin():
    """3 of 8 on average; a round may have nobody, or everybody, and no client depends on another."""
    samples = [schedule(independent=True).sample(r) for r in range(1, 801)]
    sizes = [len(s) for s in samples]
    assert 2.8 < sum(sizes) / len(sizes) < 3.2
    assert min(sizes) == 0 and max(sizes) >= 6
    assert all(list(s) == sorted(s) for s in samples)
    both = sum({"a", "b"} <= set(s) for s in samples) / len(samples)
    assert abs(both - (3 / 8) ** 2) < 0.04
    assert samples[:9] == [schedule(independent=True).sample(r) for r in range(1, 10)]


def test_a_secret_sample_does_not_follow_from_the_seed():
    draws = [[schedule(independent=True, secret=True).sample(r) for r in range(40)] for _ in range(2)]
    assert draws[0] != draws[1]


def test_a_queue_has_everybody_who_can_be_reached_in_an_order_of_the_round_s_own():
    plan = schedule()
    queues = [plan.queue(r) for r in range(1, 6)]
    assert all(sorted(q) == list(CLIENTS) for q in queues) and len(set(queues)) == 5
    some = schedule(there=lambda round, attempt: frozenset("bdf"))
    assert sorted(some.queue(1)) == ["b", "d", "f"]
    assert some.sample(1) == ("b", "d", "f")  # no more are there than are wanted
    assert set(schedule(2, there=lambda round, attempt: frozenset("bdf")).sample(1)) < set("bdf")


def test_the_server_looks_again_until_as_many_are_there_as_a_round_needs():
    looked = []

    def there(round: int, attempt: int) -> frozenset[str]:
        looked.append((round, attempt))
        return frozenset("abc"[:attempt])

    plan = schedule(3, federation={"min_clients": 2}, there=there)
    assert plan.sample(4) == ("a", "b")
    assert looked == [(4, 0), (4, 1), (4, 2)]
    looked.clear()
    assert sorted(plan.queue(5, fewest=3)) == ["a", "b", "c"]
    assert looked[-1] == (5, 3)
    assert schedule(3, there=there).queue(6, fewest=0) == ()


def test_it_gives_up_where_too_few_are_ever_there():
    looked = []
    plan = schedule(3, federation={"min_clients": 2}, there=lambda r, attempt: looked.append(attempt) or frozenset("a"))
    with pytest.raises(RunFailed, match=r"1000 times in a row fewer than 2 of 8 clients were there for round 3"):
        plan.sample(3)
    assert looked == list(range(ATTEMPTS))


@pytest.mark.parametrize(
    ("every", "rounds"), [(0, [0, 7]), (1, [0, 1, 2, 3, 4, 5, 6, 7]), (2, [0, 2, 4, 6, 7]), (5, [0, 5, 7]), (9, [0, 7])]
)
def test_it_is_measured_before_after_and_every_so_many_rounds(every, rounds):
    assert [r for r in range(8) if schedule(every=every).evaluates(r)] == rounds


def test_those_that_are_measured():
    assert schedule().measuring == ("a", "b")
    assert schedule(measured=("b",)).measuring == ("b",)
    assert schedule(measured=()).measuring == ()
    assert (schedule(0.5).sampled(), schedule(None).sampled(), schedule(5).sampled()) == (4, 8, 5)


# ------------------------------------------------------------------ a recipe's schedule


def made(algorithm: str = "fedavg", clients: int | None = 3, **values: Any) -> Schedule:
    """Of eight clients; the last one has no training data and the first no test data."""
    shards = {c: Shard((i,) if c != "h" else (), (), (10 + i,) if c != "a" else ()) for i, c in enumerate(CLIENTS)}
    federation = {"federation.clients_per_round": clients, "federation.min_clients": 1, "train.steps": 5}
    recipe = Recipe.parse({"seed": 9, **values, "algorithm": algorithm}, federation)
    return make_schedule(
        recipe, SimpleNamespace(properties=registry.algorithms.get(algorithm).properties), Partition(shards, "meta", 9)
    )


def test_a_plain_schedule():
    plan = made(evaluation={"every": 4})
    assert (plan.training, plan.testing, plan.measuring) == (CLIENTS[:-1], CLIENTS[1:], CLIENTS[1:])
    assert (plan.steps, plan.every, plan.seed, plan.sampled()) == (5, 4, 9, 3)
    assert (plan.sampling.independent, plan.sampling.secret, plan.sampling.there) == (False, False, None)
    assert len(made(evaluation={"clients": 2}).measuring) == 2


def test_under_a_pooled_baseline_one_client_takes_everybodys_steps():
    plan = made("global")
    assert (plan.training, plan.sampled(), plan.steps, plan.federation.min_clients) == (("all-clients",), 1, 15, 1)
    assert made("global", clients=None).steps == 35


PRIVACY = {"noise": 1.0, "delta": 1e-5}


def test_a_private_schedule_samples_as_the_accountant_counts():
    """Independently and secretly at a trusted server; nobody has to come. With everybody in each round there is no sample."""
    plan = made(privacy=PRIVACY)
    assert (plan.sampling.independent, plan.sampling.secret, plan.federation.min_clients, plan.sampled()) == (
        True,
        True,
        0,
        3,
    )
    seeded = made(privacy={**PRIVACY, "seeded": True})
    assert (seeded.sampling.independent, seeded.sampling.secret) == (True, False)
    for everybody in (made(clients=None, privacy=PRIVACY), made(clients=7, privacy=PRIVACY)):
        assert (everybody.sampling.independent, everybody.sampling.secret, everybody.federation.min_clients) == (
            False,
            True,
            1,
        )
    at_clients = made(privacy={**PRIVACY, "where": "client"})
    assert (at_clients.sampling.independent, at_clients.sampling.secret, at_clients.federation.min_clients) == (
        False,
        True,
        1,
    )
