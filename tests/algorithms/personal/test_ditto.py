"""Ditto: the shared path is FedAvg's to the bit, the personal model is held by λ, and never travels."""

from __future__ import annotations

import pytest
import torch

from fedloom.common.errors import UserError
from tests.helpers.federation import Federation

KEEP = {"train.optimizer_state": "keep", "adapter.dropout": 0.1, "train.schedule": "constant"}


def run(recipe, folder, rounds=2, **options):
    federation = Federation(recipe({"algorithm": {"name": "ditto", **options}, **KEEP}), folder)
    for number in range(1, rounds + 1):
        federation.round(number)
    return federation


def test_the_shared_path_is_fedavg_bit_for_bit(tiny_recipe, tmp_path):
    """With kept moments and dropout: a moment or a random number taken from the other path would show."""
    plain = Federation(tiny_recipe(KEEP), tmp_path / "fedavg")
    ditto = Federation(tiny_recipe({"algorithm.name": "ditto", **KEEP}), tmp_path / "ditto")
    for number in (1, 2, 3):
        for mine, theirs in zip(ditto.round(number), plain.round(number), strict=True):
            assert all(torch.equal(mine.payload.tensors[n], t) for n, t in theirs.payload.tensors.items())
            assert mine.metrics["loss"] == theirs.metrics["loss"]
        assert torch.equal(ditto.server.shared.flat, plain.server.shared.flat)


def test_what_is_evaluated_is_the_personal_model(tiny_recipe, tmp_path):
    federation = run(tiny_recipe, tmp_path)
    seen = {c: federation.evaluated(c, 2) for c in federation.clients}
    shared = federation.server.shared.flat
    assert all(not torch.equal(flat, shared) for flat in seen.values())
    assert len({flat.sum().item() for flat in seen.values()}) == len(seen)


def test_a_client_that_never_trained_is_measured_with_the_shared_model(tiny_recipe, tmp_path):
    federation = Federation(tiny_recipe({"algorithm.name": "ditto"}), tmp_path)
    federation.round(1, federation.clients[:1])
    assert torch.equal(federation.evaluated(federation.clients[2], 1), federation.server.shared.flat)


def test_without_the_proximal_term_the_personal_model_is_local_training(tiny_recipe, tmp_path):
    """λ=0, kept moments: exactly what the `local` baseline ends with, so its moments are its own.

    Three rounds, since the two paths' moments are the same until the first average has been trained on.
    """
    keep = {"train.optimizer_state": "keep", "train.schedule": "constant"}
    ditto = Federation(tiny_recipe({"algorithm": {"name": "ditto", "lam": 0.0}, **keep}), tmp_path / "ditto")
    local = Federation(tiny_recipe({"algorithm.name": "local", **keep}), tmp_path / "local")
    for number in (1, 2, 3):
        ditto.round(number)
        local.round(number)
    for client in ditto.clients:
        assert torch.equal(ditto.evaluated(client, 3), local.evaluated(client, 3))


def test_reset_means_reset_for_both(tiny_recipe, tmp_path):
    reset = Federation(tiny_recipe({"algorithm": {"name": "ditto", "lam": 0.0}}), tmp_path / "ditto")
    local = Federation(tiny_recipe({"algorithm.name": "local"}), tmp_path / "local")
    for number in (1, 2):
        reset.round(number)
        local.round(number)
    assert torch.equal(reset.evaluated(reset.clients[0], 2), local.evaluated(local.clients[0], 2))


def test_the_personal_step_is_the_gradient_of_the_proximal_objective(tiny_recipe, tmp_path):
    """One SGD step from v: v − η(∇F(v) + λ(v − w)), the gradient from the same step with λ=0."""
    sgd = {
        "train.optimizer": "sgd",
        "train.steps": 1,
        "train.clip": None,
        "train.schedule": "constant",
        "train.lr": 0.1,
    }
    lam, ends = 0.7, {}
    for value in (0.0, lam):
        recipe = tiny_recipe({"algorithm": {"name": "ditto", "lam": value}, **sgd})
        federation = Federation(recipe, tmp_path / str(value))
        federation.round(1)
        start, anchor = federation.evaluated("copy", 1), federation.server.shared.flat.clone()
        federation.round(2)
        ends[value] = federation.evaluated("copy", 2)
    # round 1 starts from v = w: there the term is 0 and both federations agree
    assert torch.allclose(ends[0.0] - ends[lam], 0.1 * lam * (start - anchor), atol=1e-7)
    assert (start - anchor).abs().max() > 1e-4


def test_a_large_lambda_holds_the_personal_model_at_the_shared_one(tiny_recipe, tmp_path):
    sgd = {"train.optimizer": "sgd", "train.lr": 1e-2, "train.clip": None, "train.schedule": "constant"}
    gaps = []
    for lam in (0.0, 10.0, 90.0):
        recipe = tiny_recipe({"algorithm": {"name": "ditto", "lam": lam}, "train.steps": 20, **sgd})
        federation = Federation(recipe, tmp_path / str(lam))
        start = federation.server.shared.flat.clone()
        federation.round(1, ["copy"])
        gaps.append(float((federation.evaluated("copy", 1) - start).norm()))
    assert gaps[0] > 1.5 * gaps[1] > 1.5 * 1.5 * gaps[2]


def test_the_personal_model_never_travels(tiny_recipe, tmp_path):
    federation = run(tiny_recipe, tmp_path)
    own = [federation.evaluated(c, 2) for c in federation.clients]
    layout = federation.model.adapter.layout
    for message in federation.messages:
        for payload in (message.down, message.up):
            for name, tensor in (payload.tensors if payload else {}).items():
                assert all(not torch.equal(layout.views(flat)[name], tensor) for flat in own)


def test_both_trainings_are_counted(tiny_recipe, tmp_path):
    plain = Federation(tiny_recipe(), tmp_path / "fedavg").train("copy", 1).cost
    ditto = Federation(tiny_recipe({"algorithm.name": "ditto"}), tmp_path / "ditto").train("copy", 1).cost
    for what in ("steps", "train_tokens", "train_flops"):
        assert getattr(ditto, what) == 2 * getattr(plain, what)


def test_a_negative_lambda_is_refused(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match=r"algorithm\.lam"):
        Federation(tiny_recipe({"algorithm": {"name": "ditto", "lam": -1.0}}), tmp_path)
