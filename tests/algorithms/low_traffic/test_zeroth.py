"""The zeroth-order estimate: unbiased on a quadratic, exact along its direction, repeatable under dropout, counted."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from fedloom.algorithms.low_traffic.directions import Direction, Directions
from fedloom.algorithms.low_traffic.zeroth import descend, two_point
from fedloom.common.errors import ClientFailed
from fedloom.common.randomness import fork_torch
from fedloom.data.batching import Batch
from fedloom.models import forward
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.forward import token_losses
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig, TrainConfig
from fedloom.training.flops import Flops
from fedloom.training.trainer import LocalRun
from tests.helpers import tiny
from tests.helpers.federation import Federation


def adapted(**values) -> AdaptedModel:
    base = tiny.causal_lm().requires_grad_(False)
    model = attach(
        Base(base, tiny.tokenizer(), ""), AdapterConfig(rank=1, alpha=2, target_modules=["q_proj"], **values), 0
    )
    model.adapter.flat.copy_(0.3 * torch.randn(model.adapter.layout.numel, generator=torch.Generator().manual_seed(1)))
    return model


def quadratic(model):
    """f(w) = ½ wᵀ H w + bᵀ w in float64, and its gradient, at the live weights."""
    size = model.adapter.layout.numel
    draw = torch.Generator().manual_seed(2)
    root = torch.randn(size, size, generator=draw, dtype=torch.float64) / size**0.5
    h, b = root @ root.T, torch.randn(size, generator=draw, dtype=torch.float64)

    def loss():
        w = model.adapter.flat.double()
        return float(0.5 * w @ h @ w + b @ w)

    return loss, h @ model.adapter.flat.double() + b


def test_the_estimate_is_unbiased_on_a_quadratic():
    """Mean of ĝz over 4000 directions against the gradient: each component within its own sampling error."""
    model = adapted()
    loss, gradient = quadratic(model)
    space = Directions(0, model.adapter.layout.numel)
    drawn = [space.dense(Direction(1, j)) for j in range(4000)]
    estimates = torch.stack([two_point(model, z, loss, 1e-2)[0] * z.double() for z in drawn])
    error = (estimates.mean(dim=0) - gradient) / (estimates.std(dim=0) / len(drawn) ** 0.5)
    assert error.abs().max() < 4.5  # of 128 components
    assert abs(float(error.square().mean()) - 1) < 0.5
    aligned = float(estimates.mean(dim=0) @ gradient / gradient.square().sum())
    assert aligned == pytest.approx(1, abs=0.1)  # a factor of 2, or a z of its own for the step, fails here


def test_the_slope_is_the_derivative_along_the_direction_and_nothing_moves():
    model = adapted()
    loss, gradient = quadratic(model)
    before = model.adapter.flat.clone()
    z = Directions(0, model.adapter.layout.numel).dense(Direction(1, 0))
    slope, value = two_point(model, z, loss, 1e-2)
    assert slope == pytest.approx(float(gradient @ z.double()), rel=1e-4)
    assert value == pytest.approx(loss(), abs=0.02)  # ½ ε² zᵀHz above it
    assert torch.equal(model.adapter.flat, before)


class Learner:
    """A loss that is linear in the weights: 3 Σ w, the same for every batch."""

    factor = 3.0

    def local_loss(self, model, batch, step_tokens):
        return self.factor * model.adapter.flat.sum() * len(batch.labels) / step_tokens

    def before_step(self, model): ...

    def after_step(self, model): ...


def batch(labels=4):
    return Batch(
        torch.arange(3, 11)[None], torch.arange(8)[None], (8,), None, torch.arange(labels), torch.zeros(labels).long(),
        torch.zeros(labels).long(), (0,),
    )  # fmt: skip


def walked(model, learner, *, directions=1, steps=3, **values):
    config = TrainConfig(**{"steps": steps, "lr": 1e-3, "schedule": "constant", "clip": None, **values})
    run = LocalRun(model, lambda: iter([[batch(), batch(2)]] * steps), config, 0, steps)
    space = Directions(5, model.adapter.layout.numel)
    drawn = [[space.dense(Direction(1, s * directions + p)) for p in range(directions)] for s in range(steps)]
    result, coefficients = descend(
        run, learner, lambda s: drawn[s], directions=directions, epsilon=1e-2, dropout=lambda s: nullcontext()
    )
    return result, coefficients, drawn


@pytest.mark.parametrize("directions", [1, 3])
def test_steps_go_down_the_slope_by_the_coefficients_that_travel(directions):
    model = adapted()
    start = model.adapter.flat.clone()
    result, coefficients, drawn = walked(model, Learner(), directions=directions)
    flat = [z for step in drawn for z in step]
    for a, z in zip(coefficients, flat, strict=True):  # the slope of 3 Σ w along z is 3 Σ z
        assert a == pytest.approx(1e-3 * 3.0 * float(z.sum()) / directions, rel=1e-3)
        assert float(torch.tensor(a, dtype=torch.float32)) == a
    replayed = start.double() - sum(a * z.double() for a, z in zip(coefficients, flat, strict=True))
    assert torch.allclose(model.adapter.flat.double(), replayed, atol=1e-6)
    assert model.adapter.flat.sum() < start.sum()
    assert result.steps == 3


def test_clip_bounds_the_slope_and_the_schedule_the_rate():
    _, coefficients, drawn = walked(adapted(), Learner(), clip=0.5, schedule="linear")
    signs = [math.copysign(1, float(z[0].sum())) for z in drawn]
    expected = [s * 0.5 * 1e-3 * (1 - i / 3) for i, s in enumerate(signs)]
    assert coefficients == pytest.approx(expected)


def test_every_forward_pass_is_counted_and_no_backward_one():
    model = adapted()
    result, _, _ = walked(model, Learner(), directions=3, steps=2)
    passes = 2 * 3 * 2
    assert result.tokens == passes * (8 + 8)
    assert result.flops == passes * (Flops(model).forward(batch()) + Flops(model).forward(batch(2)))
    assert not model.grad.any()


def test_both_points_see_the_same_dropout():
    """At ε = 0 the two losses are the same loss; another mask would tell them apart."""
    model = adapted(dropout=0.5)
    seen = []

    class Noted(Learner):
        def local_loss(self, model, batch, step_tokens):
            assert model.module.training
            seen.append(float(token_losses(model, batch).sum()))
            return torch.tensor(seen[-1])

    config = TrainConfig(steps=2, lr=0.0, schedule="constant")
    run = LocalRun(model, lambda: iter([[batch()]] * 2), config, 0, 2)
    zero = torch.zeros(model.adapter.layout.numel)
    dropout = partial(fork_torch, 0, "dropout", 1)
    descend(run, Noted(), lambda s: [zero], directions=1, epsilon=1e-3, dropout=lambda s: dropout(f"c/{s}"))
    assert seen[0] == seen[1] and seen[2] == seen[3]
    assert seen[0] != seen[2]
    assert not model.module.training


def test_a_loss_that_is_not_finite_fails_or_is_skipped():
    class Broken(Learner):
        factor = math.inf

    with pytest.raises(ClientFailed, match="step 1 is not finite"):
        walked(adapted(), Broken())
    model = adapted()
    before = model.adapter.flat.clone()
    result, coefficients, _ = walked(model, Broken(), nonfinite="skip", directions=2)
    assert (result.steps, result.skipped_steps, coefficients) == (0, 3, [0.0] * 6)
    assert torch.equal(model.adapter.flat, before)


def test_fedmezo_learns_and_averages(tiny_recipe, tmp_path):
    """The server's adapter is the mean of what clients sent, and the loss falls without any gradient."""
    more = {"train.steps": 20, "train.lr": 5e-2, "train.schedule": "constant", "train.batch_size": 8}
    f = Federation(tiny_recipe({"algorithm": {"name": "fedmezo", "perturbations": 2}, **more}), tmp_path)
    before = f.evaluate("copy", 0).metrics["loss_sum"]
    updates = f.round(1)
    weights = [u.num_examples for u in updates]
    for n, t in f.server.shared.tensors().items():
        mean = sum(w * u.payload.tensors[n].double() for w, u in zip(weights, updates, strict=True)) / sum(weights)
        assert torch.allclose(t.double(), mean, atol=1e-7)
    assert f.evaluate("copy", 1).metrics["loss_sum"] < 0.99 * before


def test_fedmezo_clients_draw_directions_of_their_own(tiny_recipe, tmp_path):
    f = Federation(tiny_recipe({"algorithm": {"name": "fedmezo"}, "train.steps": 1}), tmp_path)
    start = f.server.shared.flat.clone()
    moves = []
    for client, round in (("copy", 1), ("last", 1), ("copy", 2)):
        sent = f.server.shared.snapshot()
        sent.load(f.train(client, round).payload.tensors)
        moves.append((sent.flat - start) / (sent.flat - start).norm())
    gram = torch.stack(moves) @ torch.stack(moves).T
    assert (gram - torch.eye(3)).abs().max() < 0.2


def test_adaloras_penalty_takes_part(tiny_recipe, tmp_path):
    """The term that the trainer's own loop adds must not be lost in this one."""
    ends = []
    for weight in (0.0, 5.0):
        more = {"adapter": {"method": "adalora", "rank": 2, "alpha": 4, "orthogonality": weight}, "train.clip": None}
        f = Federation(tiny_recipe({"algorithm": {"name": "fedkseed"}, **more}), tmp_path / str(weight))
        f.train("copy", 1)
        ends.append(f.live())
    assert not torch.allclose(ends[0], ends[1], atol=1e-6)


@pytest.mark.parametrize("algorithm", ["fedmezo", "fedkseed", "decomfl"])
def test_logits_are_made_in_chunks_where_the_recipe_says_so(tiny_recipe, tmp_path, monkeypatch, algorithm):
    chunks, losses, plain = [], [], forward.chunked_losses
    monkeypatch.setattr(forward, "chunked_losses", lambda *a: chunks.append(a[-1]) or plain(*a))
    for chunk in (None, 5):
        more = {"algorithm": algorithm, "train.loss_chunk": chunk, "adapter.dropout": 0.1, "train.steps": 2}
        federation = Federation(tiny_recipe(more), tmp_path / str(chunk))
        chunks.clear()  # the model was tried
        losses.append(federation.train("copy", 1).metrics["loss"])
    assert chunks and set(chunks) == {5}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
