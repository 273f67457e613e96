"""Fed-SB: r² numbers a module travel, B and A never move, and the mean is exact."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.lora.fed_sb import middle
from fedloom.messages.types import Payload
from fedloom.models.layout import WeightedMean
from fedloom.models.lowrank import LowRank, relative_gap
from tests.helpers.lora_rounds import ALPHA, RANK, client, drawn, local_run, models, result, server, trained


def products(algorithm, payload, dtype=torch.float64):
    s = ALPHA / RANK
    return {
        p.weight: LowRank(
            s * algorithm.left[p.b].to(dtype), payload.tensors[middle(p.a)].to(dtype) @ algorithm.right[p.a].to(dtype)
        )
        for p in algorithm.pairs
    }


def learned_of(algorithm, updates):
    each = [products(algorithm, u.payload) for u in updates]
    return {
        w: LowRank.stack((u.num_examples / 8, e[w].b, e[w].a) for u, e in zip(updates, each, strict=True))
        for w in each[0]
    }


def test_exact():
    algorithm = server("fed_sb")
    updates = drawn(algorithm)
    exact = learned_of(algorithm, updates)
    mean = WeightedMean(algorithm.core.layout)
    for u in updates:
        mean.add(u.payload.tensors, u.num_examples)
    double = Payload(algorithm.core.layout.views(mean.result(torch.float64)))
    assert relative_gap(products(algorithm, double), exact) <= 1e-12
    algorithm.aggregate(iter(updates))
    assert relative_gap(result(algorithm), exact) <= 1e-6


def test_traffic_is_r_squared_a_module_each_way():
    of = models()
    central, algorithm = server("fed_sb", of=of), client("fed_sb", of)
    down = central.round_payload("a")
    up = trained(algorithm, down)
    for payload in (down, up):
        assert sum(t.numel() * t.element_size() for t in payload.tensors.values()) == RANK**2 * len(central.pairs) * 4
    assert any(t.any() for t in up.tensors.values())


def test_b_and_a_never_move_and_both_sides_draw_the_same():
    of = models()
    central, algorithm = server("fed_sb", of=of), client("fed_sb", models())  # another process
    left = {n: t.clone() for n, t in central.left.items()}
    right = {n: t.clone() for n, t in central.right.items()}
    sent = trained(algorithm, central.round_payload("a"), weight_decay=0.1)
    live = algorithm.model.adapter.views
    for p in algorithm.pairs:
        assert torch.equal(live[p.b], left[p.b]) and torch.equal(algorithm.right[p.a], right[p.a])
        assert torch.equal(live[p.a], sent.tensors[middle(p.a)] @ right[p.a])
    update = type(drawn(central)[0])("a", 1, sent, num_examples=2)
    central.aggregate(iter([update]))
    assert torch.equal(central.deployed().adapter.flat, algorithm.model.adapter.flat)


def test_it_starts_as_the_base_model():
    assert all(float(low.norm()) == 0 for low in result(server("fed_sb")).values())


def test_the_gradient_of_r_by_finite_differences():
    """A step of plain SGD is −lr·∂L/∂R; along it the loss falls by the gradient's norm."""
    of = models()
    algorithm = client("fed_sb", of)
    algorithm.begin("a", 1, None)
    draw = torch.Generator().manual_seed(3)
    start = Payload({n: 0.1 * torch.randn(s, generator=draw) for n, s in algorithm.core.layout.shapes.items()})
    algorithm.receive(start)
    before = algorithm.core.flat.clone()
    run = local_run(algorithm, steps=1, optimizer="sgd", lr=1.0, clip=None)
    (batch,) = next(iter(run.steps()))
    algorithm.local_training(run)
    gradient = before - algorithm.core.flat

    def loss(step: float) -> float:
        algorithm.core.flat.copy_(before).add_(gradient / gradient.norm(), alpha=step)
        algorithm._compose(algorithm.model.adapter)
        with torch.no_grad():
            return float(algorithm.local_loss(algorithm.model, batch, len(batch.labels)))

    assert (loss(2e-2) - loss(-2e-2)) / 4e-2 == pytest.approx(float(gradient.norm()), rel=2e-2)
