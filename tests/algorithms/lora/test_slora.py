"""SLoRA: a sparse stage under one mask for all, its SVD as the first LoRA, then averaging."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.lora.slora import SPARSE
from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import Payload, Update
from tests.helpers.lora_rounds import ALPHA, RANK, client, drawn, local_run, models, result, server, trained


def test_both_sides_draw_one_mask_with_lora_s_budget():
    central, other = server("slora"), client("slora", models())
    for weight, at in central.mask.items():
        rows, columns = central.shapes[weight]
        assert len(at) == min(rows * columns, RANK * (rows + columns)) == len(at.unique())
        assert torch.equal(at, other.mask[weight])
    thin = server("slora", density=0.01)
    assert {len(at) for at in thin.mask.values()} == {10, 20, 5}


def test_only_entries_under_the_mask_move_and_they_are_what_travels():
    of = models()
    central, algorithm = server("slora", of=of, density=0.1), client("slora", of, density=0.1)
    weights = of.adapted().base_weights()
    before = {w: weights[w].detach().clone() for w in central.mask}
    sent = trained(algorithm, central.round_payload("a"), lr=1e-2)
    assert sent.tensors.keys() == {SPARSE + w for w in central.mask}
    for weight, at in central.mask.items():
        moved = (weights[weight].detach() - before[weight]).flatten()
        assert torch.allclose(moved[at], sent.tensors[SPARSE + weight], atol=1e-6) and moved[at].any()
        moved[at] = 0
        assert not moved.any()
        assert not weights[weight].requires_grad and weights[weight].grad is None
    central.aggregate(iter([Update("a", 1, sent, num_examples=2)]))
    algorithm.begin("b", 2, None)
    algorithm.receive(central.round_payload("b"))  # the second stage stands on the weights as they were loaded
    assert all(torch.equal(weights[w], before[w]) for w in before)


def test_a_sparse_step_is_the_dense_gradient_under_the_mask():
    of = models()
    algorithm = client("slora", of, density=0.2)
    algorithm.begin("a", 1, None)
    algorithm.receive(server("slora", of=of, density=0.2).round_payload("a"))
    run = local_run(algorithm, steps=1, optimizer="sgd", lr=0.5, clip=None)
    weight = algorithm.pairs[0].weight
    live = of.adapted().base_weights()[weight].requires_grad_(True)
    (batch,) = next(iter(run.steps()))
    algorithm.local_loss(of.adapted(), batch, len(batch.labels)).backward()
    expected = -0.5 * live.grad.flatten()[algorithm.mask[weight]]
    live.requires_grad_(False)
    live.grad = None
    algorithm.local_training(run)
    assert torch.allclose(algorithm.sparse.views[SPARSE + weight], expected, rtol=1e-4, atol=1e-7)


def test_lora_starts_from_the_leading_directions():
    central = server("slora", density=1.0)
    draw = torch.Generator().manual_seed(0)
    low = {p.weight: [torch.randn(n, 2, generator=draw) for n in central.shapes[p.weight]] for p in central.pairs}
    whole = {SPARSE + w: (u @ v.T).flatten() for w, (u, v) in low.items()}
    metrics = central.aggregate(iter([Update("a", 1, Payload(whole), num_examples=1)]))
    assert metrics["kept"] == pytest.approx(1.0, abs=1e-6)  # rank 2 fits into rank 3
    for weight, found in result(central).items():
        exact = whole[SPARSE + weight].view(central.shapes[weight]).double()
        assert (found.dense() - exact).norm() <= 1e-5 * exact.norm()


def test_what_does_not_fit_is_said():
    central = server("slora")
    update = drawn(central)[0]
    metrics = central.aggregate(iter([update]))
    lost = size = 0.0
    for weight, found in result(central).items():
        dense = central.dense(weight).double()
        lost += float((found.dense() - dense).norm() ** 2)
        tail = torch.linalg.svdvals(dense)[RANK:].norm()
        assert float((found.dense() - dense).norm()) == pytest.approx(float(tail), rel=1e-3)
        size += float(dense.norm() ** 2)
    assert metrics["kept"] == pytest.approx((1 - lost / size) ** 0.5, rel=1e-4)
    assert ALPHA / RANK == 2


def test_the_sparse_average_is_deployed_and_survives_a_restart():
    of = models()
    central = server("slora", of=of, sparse_rounds=2)
    updates = drawn(central)
    central.aggregate(iter(updates))
    weight = central.pairs[0].weight
    a, b, c = (u.payload.tensors[SPARSE + weight] for u in updates)
    delta = central.deployed().base_delta[weight].flatten()[central.mask[weight]]
    assert torch.allclose(delta, (a + 3 * b + 4 * c) / 8, atol=1e-7)
    again = server("slora", of=of, sparse_rounds=2)
    again.load_server_state(from_bytes(to_bytes(central.server_state())))
    for one in (central, again):
        one.aggregate(iter(drawn(one, 7)))
    assert torch.equal(again.shared.flat, central.shared.flat) and again.deployed().base_delta is None


def test_no_sparse_rounds_is_fedavg():
    central, plain = server("slora", sparse_rounds=0), server("fedit")
    assert central.round_payload("a").tensors.keys() == plain.round_payload("a").tensors.keys()
    updates = drawn(plain)
    central.aggregate(iter(updates))
    plain.aggregate(iter(updates))
    assert torch.equal(central.shared.flat, plain.shared.flat)
