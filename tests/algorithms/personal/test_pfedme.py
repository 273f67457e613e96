"""pFedMe: the local step follows the Moreau envelope, λ → ∞ is FedAvg, and the minimiser inside is what is evaluated."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.base import Algorithm
from fedloom.algorithms.personal.pfedme import PFedMe
from fedloom.messages.types import Payload, Update
from fedloom.models.forward import token_losses
from fedloom.training import precision
from tests.helpers.federation import Federation

SGD = {"train.optimizer": "sgd", "train.lr": 0.1, "train.clip": None, "train.schedule": "constant"}


def pfedme(recipe, folder, more=None, **options):
    return Federation(recipe({"algorithm": {"name": "pfedme", **options}, **(more or {})}), folder)


@pytest.mark.parametrize(("inner", "method"), [(1, "lora"), (3, "lora"), (2, "adalora")])
def test_an_infinite_lambda_is_fedavg(tiny_recipe, tmp_path, inner, method):
    """Under AdaLoRA too, whose penalty every pass has to add."""
    more = {"adapter.method": method}
    plain = Federation(tiny_recipe(more), tmp_path / "fedavg")
    limit = pfedme(tiny_recipe, tmp_path / "pfedme", more, lam=1e30, inner_steps=inner)
    for number in (1, 2):
        plain.round(number)
        limit.round(number)
        assert torch.equal(plain.server.shared.flat, limit.server.shared.flat)


def test_a_finite_lambda_is_not(tiny_recipe, tmp_path):
    plain = Federation(tiny_recipe(), tmp_path / "fedavg")
    held = pfedme(tiny_recipe, tmp_path / "pfedme", inner_steps=3)
    plain.round(1)
    held.round(1)
    assert not torch.equal(plain.server.shared.flat, held.server.shared.flat)


def test_the_local_step_is_the_gradient_of_the_moreau_envelope(tiny_recipe, tmp_path):
    """One SGD step: the update is −η λ (w − θ̂), and θ̂ minimises f + λ/2 ‖θ − w‖²: its gradient there vanishes."""
    lam = 40.0
    federation = pfedme(tiny_recipe, tmp_path, {**SGD, "train.steps": 1}, lam=lam, inner_steps=30)
    model, start = federation.model, federation.server.shared.flat.clone()
    draw = torch.Generator().manual_seed(3)
    federation.server.shared.copy_(start + 0.1 * torch.randn(len(start), generator=draw))  # away from B = 0
    w = federation.server.shared.flat.clone()
    seen: list = []
    loss = PFedMe.local_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PFedMe, "local_loss", lambda s, m, b, t: (seen.append((b, t)), loss(s, m, b, t))[1])
        update = federation.train("copy", 1)
    theta = federation.evaluated("copy", 1)
    sent = federation.server.shared.snapshot()
    sent.load(update.payload.tensors)
    assert torch.allclose(w - sent.flat, 0.1 * lam * (w - theta), atol=2e-6)
    assert (w - theta).norm() > 1e-3
    model.adapter.copy_(theta)
    model.grad.zero_()
    (batch, tokens) = seen[0]
    (token_losses(model, batch).sum() / tokens).backward()
    residual = model.grad + lam * (theta - w)
    assert residual.norm() < 1e-3 * model.grad.norm()
    model.grad.zero_()


def test_what_is_evaluated_is_personal_and_never_travels(tiny_recipe, tmp_path):
    federation = pfedme(tiny_recipe, tmp_path)
    federation.round(1)
    federation.round(2)
    seen = [federation.evaluated(c, 2) for c in federation.clients]
    assert all(not torch.equal(flat, federation.server.shared.flat) for flat in seen)
    assert len({float(flat.sum()) for flat in seen}) == len(seen)
    layout = federation.model.adapter.layout
    for message in federation.messages:
        for payload in (message.down, message.up):
            for name, tensor in (payload.tensors if payload else {}).items():
                assert all(not torch.equal(layout.views(flat)[name], tensor) for flat in seen)


def test_evaluation_does_not_change_what_training_starts_from(tiny_recipe, tmp_path):
    measured, left = (pfedme(tiny_recipe, tmp_path / n) for n in ("measured", "left"))
    for number in (1, 2):
        for client in measured.clients:
            measured.evaluate(client, number - 1)
        measured.round(number)
        left.round(number)
    assert torch.equal(measured.server.shared.flat, left.server.shared.flat)


def test_the_server_goes_a_part_of_the_way(tiny_recipe, tmp_path):
    federation = pfedme(tiny_recipe, tmp_path, beta=0.25)
    server = federation.server
    start = server.shared.flat.clone()
    ends = [start + 1.0, start + 5.0]
    views = [server.shared.layout.views(e) for e in ends]
    server.aggregate(iter([Update("a", 1, Payload(views[0]), 1), Update("b", 1, Payload(views[1]), 3)]))
    assert torch.allclose(server.shared.flat, start + 0.25 * 4.0, atol=1e-6)


def test_every_pass_is_counted(tiny_recipe, tmp_path):
    one, three = (pfedme(tiny_recipe, tmp_path / str(k), inner_steps=k).train("copy", 1).cost for k in (1, 3))
    assert three.train_tokens == 3 * one.train_tokens
    assert three.train_flops == 3 * one.train_flops
    assert three.steps == one.steps


def test_accumulated_batches_all_enter_the_inner_steps(tiny_recipe, tmp_path):
    """Two batches of one and one of two are the same step."""
    ends = []
    for size, accumulation in ((2, 1), (1, 2)):
        more = {"train.batch_size": size, "train.accumulation": accumulation, **SGD}
        federation = pfedme(tiny_recipe, tmp_path / str(size), more, inner_steps=3)
        federation.round(1)
        ends.append(federation.evaluated("copy", 1))
    assert torch.allclose(ends[0], ends[1], atol=1e-5)


@pytest.mark.parametrize("setting", [("checkpointing", True), ("loss_chunk", 4), ("precision", "bf16")], ids=str)
def test_inner_passes_are_as_the_recipe_asks(tiny_recipe, tmp_path, monkeypatch, setting):
    seen, plain = [], Algorithm.local_loss

    def watched(self, model, *arguments):
        precision = "bf16" if torch.is_autocast_enabled("cpu") else "fp32"
        seen.append((model.causal_lm.is_gradient_checkpointing, model.loss_chunk, precision))
        return plain(self, model, *arguments)

    monkeypatch.setattr(Algorithm, "local_loss", watched)
    key, value = setting
    pfedme(tiny_recipe, tmp_path, {f"train.{key}": value, "train.steps": 1}, inner_steps=3).train("copy", 1)
    expected = {"checkpointing": False, "loss_chunk": None, "precision": "fp32"} | {key: value}
    assert seen == [tuple(expected.values())] * 3


def test_inner_gradients_survive_fp16_by_a_scale(tiny_recipe, tmp_path, monkeypatch):
    """Of a loss so small that without one they are lost."""
    small, gradients, plain = 2.0**-22, [], Algorithm.local_loss
    monkeypatch.setattr(Algorithm, "local_loss", lambda self, *arguments: plain(self, *arguments) * small)
    after_step = PFedMe.after_step
    monkeypatch.setattr(PFedMe, "after_step", lambda s, m: gradients.append(m.grad.clone()) or after_step(s, m))
    for kind in ("fp32", "fp16"):
        more = {"train.precision": kind, "train.steps": 1, "train.clip": None}
        pfedme(tiny_recipe, tmp_path / kind, more, lam=5.0 * small, inner_steps=2).train("copy", 1)
    exact, scaled = gradients
    assert float((scaled - exact).norm() / exact.norm()) < 2e-2


def test_a_step_that_is_computed_again_for_its_loss_scale_shows_each_batch_once(tiny_recipe, tmp_path, monkeypatch):
    """Twice the inner gradient would leave the personal model twice as far from the shared one."""
    more = {"algorithm": {"name": "pfedme", "lam": 5.0, "inner_steps": 3}, "train.precision": "fp16"}
    ends, tokens = [], []
    for first in (2.0**10, 2.0**30):  # no overflow, and many
        monkeypatch.setattr(precision, "FIRST_SCALE", first)
        federation = Federation(tiny_recipe(more), tmp_path / str(first))
        updates = federation.round(1)
        ends.append(federation.server.shared.flat.clone())
        tokens.append(sum(u.cost.train_tokens for u in updates))
    assert tokens[1] > tokens[0]
    begun = Federation(tiny_recipe(more), tmp_path / "begun").server.shared.flat
    assert float((ends[1] - ends[0]).norm()) < 0.02 * float((ends[0] - begun).norm())
