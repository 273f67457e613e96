"""Whole runs of the averaging and robust algorithms on the tiny model: two rounds, interrupted ones, hostile clients."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fedloom import run
from fedloom.common import registry
from fedloom.common.errors import RunFailed
from fedloom.federation.record.events import read_events
from fedloom.messages.types import Payload

pytestmark = pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")

NAMES = (
    "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco",
    "median", "trimmed_mean", "krum", "geometric_median", "norm_bound",
)  # fmt: skip
ROBUST = ("median", "trimmed_mean", "krum", "geometric_median", "norm_bound")


def digest(result) -> str:
    return result.summary["adapter_sha256"]


@pytest.mark.parametrize("name", NAMES)
def test_two_rounds_and_a_resumed_second_round_are_the_same_bit_for_bit(tiny_recipe, tmp_path, name):
    values = {
        "algorithm.name": name, "train.schedule": "constant", "train.optimizer_state": "keep", "adapter.dropout": 0.1,
        "federation.clients_per_round": 2, "federation.rounds": 3,
    }  # fmt: skip
    whole = run(tiny_recipe(values), tmp_path / "whole")
    assert whole.summary["loss"]["after"] < whole.summary["loss"]["before"]
    run(tiny_recipe({**values, "federation.rounds": 2}), tmp_path / "halted")
    resumed = run(tiny_recipe(values), tmp_path / "halted", resume=True)
    assert digest(resumed) == digest(whole)
    finished = [e for e in read_events(tmp_path / "whole" / "events.jsonl") if e["event"] == "round_finished"]
    assert [e["updates"] for e in finished] == [2, 2, 2]
    assert all(e["metrics"]["distance_moved"] > 0 for e in finished)


@pytest.mark.parametrize("name", ["fedavg", *NAMES])
def test_one_client_under_neutral_options_is_plain_local_training(tiny_recipe, tmp_path, name):
    neutral = registry.algorithms.get(name).properties.neutral
    if neutral is None:
        assert name in {"fedadagrad", "fedadam", "fedyogi"}  # no options make these the identity
        return
    alone = {"split.splitter": "uniform", "split.num_clients": 1, "train.optimizer_state": "keep"}
    options = {f"algorithm.{k}": v for k, v in neutral.items()}
    mine = run(tiny_recipe({**alone, "algorithm.name": name, **options}), tmp_path / "mine")
    plain = run(tiny_recipe({**alone, "algorithm.name": "local"}), tmp_path / "local")
    weights = [(r.folder / "adapter").exists() for r in (mine, plain)]
    assert weights == [True, False]
    own = next((plain.folder / "adapters").iterdir())
    assert (mine.folder / "adapter/adapter_model.safetensors").read_bytes() == (
        own / "adapter_model.safetensors"
    ).read_bytes()


def test_options_that_are_not_neutral_change_the_run(tiny_recipe, tmp_path):
    alone = {"split.splitter": "uniform", "split.num_clients": 1}
    plain = digest(run(tiny_recipe({**alone, "algorithm.name": "fedavg"}), tmp_path / "fedavg"))
    for name, options in {
        "fedprox": {"algorithm.mu": 1.0}, "fedavgm": {}, "diloco": {}, "norm_bound": {"algorithm.bound": 0.1},
    }.items():  # fmt: skip
        mine = run(tiny_recipe({**alone, "algorithm.name": name, **options}), tmp_path / name)
        assert digest(mine) != plain, name


# ------------------------------------------------------------------ hostile clients

TEN = {
    "split.splitter": "uniform", "split.num_clients": 10, "split.test": 0.2, "split.validation": 0.0,
    "train.steps": 4, "federation.rounds": 3, "evaluation.every": 0,
}  # fmt: skip


def spoilt(name, spoil):
    """The algorithm `name` with one client in ten whose payload `spoil` makes."""
    cls = registry.algorithms.get(name)

    class Hostile(cls):
        def shared_state(self):
            payload = super().shared_state()
            if self.client != HOSTILE:
                return payload
            struck.append(self.round)
            draw = torch.Generator().manual_seed(self.round)
            return Payload({n: spoil(t.clone(), draw) for n, t in payload.tensors.items()})

    return Hostile


HOSTILE = "client-03"
struck: list[int] = []
ATTACKS = {
    "noise": lambda t, draw: t + 1e3 * torch.randn(t.shape, generator=draw),
    "flip": lambda t, draw: -t,
    "nan": lambda t, draw: t.fill_(float("nan")),
}


def losses(result):
    return result.summary["loss"]["after"]


@pytest.fixture
def attacked(tiny_recipe, tmp_path, monkeypatch):
    """attacked(name, attack) → a run of ten clients, one of them hostile; attack None leaves all honest."""

    def make(name, attack=None):
        monkeypatch.setitem(registry.algorithms._targets, "attacked", spoilt(name, ATTACKS[attack]) if attack
                            else registry.algorithms.get(name))  # fmt: skip
        return run(tiny_recipe({**TEN, "algorithm.name": "attacked"}), tmp_path / f"{name}-{attack}")

    return make


@pytest.mark.parametrize("name", ROBUST)
def test_one_hostile_client_in_ten_leaves_the_loss_within_ten_per_cent(attacked, name):
    clean = attacked(name)
    assert losses(clean) < clean.summary["loss"]["before"]
    for attack in ATTACKS:
        struck.clear()
        spoiled = attacked(name, attack)
        assert losses(spoiled) < 1.1 * losses(clean), attack
        assert struck == [1, 2, 3], attack  # rounds in which the attack was made
        assert spoiled.summary["failures"] == (3 if attack == "nan" else 0), attack


def ruin(attacked) -> float:
    """fedavg's loss under noise; infinity where no client's is finite after the first mean, as some processors say."""
    try:
        return losses(attacked("fedavg", "noise"))
    except RunFailed as failed:
        if "round 2 got 0 usable updates" not in str(failed):
            raise
        return math.inf


def test_fedavg_is_ruined_by_noise_but_refuses_nan_and_goes_on(attacked):
    clean = attacked("fedavg")
    assert ruin(attacked) > 1.1 * losses(clean)
    refused = attacked("fedavg", "nan")
    assert losses(refused) < 1.1 * losses(clean)
    events = [json.loads(line) for line in (refused.folder / "events.jsonl").read_text().splitlines()]
    failed = [e for e in events if e["event"] == "client_failed"]
    assert [(e["round"], e["client"], e["reason"]) for e in failed] == [(r, HOSTILE, "bad_payload") for r in (1, 2, 3)]
    assert all("not finite" in e["detail"] for e in failed)
    assert [e["updates"] for e in events if e["event"] == "round_finished"] == [9, 9, 9]
