"""What an algorithm declares of cohorts: its clients get in one pass what each gets alone; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.experiment.prepare import prepare, settle
from fedloom.federation.client import Client
from fedloom.federation.record.checkpoints import ClientStore
from fedloom.federation.watch import Watch
from fedloom.federation.workplace import find_data
from fedloom.messages.types import Assignment, Outcome, Update
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.simulator import Simulator
from tests.helpers import merging

pytestmark = pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")

OWN = {"test-merging": merging.Merging, "test-keeping": merging.Keeping}
ALL = {n: registry.algorithms.get(n) for n in registry.algorithms.names()} | OWN
TOGETHER = [n for n, cls in ALL.items() if cls.properties.cohorts and not cls.properties.pooled]
ALONE = [n for n, cls in ALL.items() if not cls.properties.cohorts]

#: An ε at which rounding stays rounding (DESIGN: AdamW as shipped enlarges it), and no two clients of one length.
VALUES = {"train.eps": 1e-4, "train.optimizer_state": "keep", "evaluation.suite": None}
OPTIONS = {"ferret": {"bases": 64, "coordinates": "unbiased"}}


@pytest.fixture(autouse=True)
def _own_algorithms(monkeypatch):
    for name, cls in OWN.items():
        monkeypatch.setitem(registry.algorithms._targets, name, cls)


def rounds(recipe: Recipe, folder: Path) -> tuple[list[Outcome], dict[str, torch.Tensor], torch.Tensor]:
    """Two rounds by hand: every outcome, what clients kept of theirs, and what the server ends with."""
    setting = prepare(recipe, Watch())
    recipe, server = setting.recipe, setting.algorithm
    store = ClientStore(folder / "clients")
    client = Client(setting.models, setting.data, setting.template, store, folder / "adapters")
    simulator = Simulator(client, setting.data.partition.clients)
    outcomes: list[Outcome] = []
    for number in (1, 2):
        work = []
        for name in setting.data.partition.training_clients:
            payload = server.initial_payload(name) if number == 1 else server.round_payload(name)
            work.append(Assignment("train", name, number, 2, payload, recipe.train.steps, recipe=recipe.resolved()))
        came = list(simulator.run(iter(work)))
        server.aggregate(u for u in came if isinstance(u, Update))
        outcomes += came
    kept = {
        f"{c}/{section}/{n}": t
        for c in setting.data.partition.training_clients
        for section, payload in store.load(c, 2).items()
        for n, t in payload.tensors.items()
        if t.is_floating_point()
    }
    deployed = server.deployed() if not server.properties.personal else None
    return outcomes, kept, deployed.adapter.flat if deployed else torch.zeros(1)


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one.double() - other.double()).norm()) <= 1e-5 * max(1.0, float(other.double().norm()))


@pytest.mark.parametrize("name", TOGETHER)
def test_together_clients_get_what_each_gets_alone(name, tiny_recipe, tmp_path):
    make: Callable[..., Recipe] = tiny_recipe
    recipe = make({"algorithm": {"name": name, **OPTIONS.get(name, {})}, **VALUES})
    alone, kept, ends = rounds(recipe, tmp_path / "alone")
    joined, kept_too, ends_too = rounds(recipe.with_values({"train.cohort": 3}), tmp_path / "together")
    assert [o.client for o in alone] == [o.client for o in joined]
    for one, other in zip(alone, joined, strict=True):
        assert isinstance(one, Update)
        assert isinstance(other, Update)
        assert one.payload.tensors.keys() == other.payload.tensors.keys()
        assert all(near(t, one.payload.tensors[n]) for n, t in other.payload.tensors.items()), one.client
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], abs=1e-5)
        counted = ("train_tokens", "train_flops", "steps")
        assert [getattr(one.cost, c) for c in counted] == [getattr(other.cost, c) for c in counted]
        assert replace(one, payload=other.payload, metrics={}, cost=other.cost) == replace(other, metrics={})
    for numbers in (joined[:3], joined[3:]):  # a cohort's time is counted once, by tokens
        rates = [o.cost.cpu_seconds / o.cost.train_tokens for o in numbers]
        assert rates == pytest.approx([rates[0]] * 3, rel=1e-6)
    assert kept.keys() == kept_too.keys()
    assert all(near(kept_too[n], t) for n, t in kept.items())
    assert near(ends_too, ends)


@pytest.mark.parametrize("name", ALONE)
def test_an_algorithm_whose_clients_need_the_base_alone_is_refused_and_auto_says_so(name, tiny_recipe):
    recipe = tiny_recipe({"algorithm": name})
    with pytest.raises(UserError, match=f"train.cohort=2 cannot be used: clients of {name} each need the base"):
        prepare(recipe.with_values({"train.cohort": 2}), Watch())
    automatic = recipe.with_values({"train.cohort": "auto"})
    settled = settle(automatic, find_data(automatic))
    assert settled.recipe.train.cohort == "off"
    assert settled.notes[0].startswith("every client trains alone: clients of")
