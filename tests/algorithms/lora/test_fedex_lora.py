"""FedEx-LoRA: averaged factors plus residual are Σ p_k ΔW_k, round after round."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.lora.fedex_lora import averaged
from fedloom.models.lowrank import LowRank, relative_gap
from tests.helpers.lora_rounds import ALPHA, RANK, drawn, gap_after, learned, models, result, server


def test_exact_in_float64():
    algorithm = server("fedex_lora")
    updates = drawn(algorithm)
    shares = [u.num_examples / 8 for u in updates]
    found = {}
    for p in algorithm.pairs:
        b = [ALPHA / RANK * u.payload.tensors[p.b].double() for u in updates]
        mean, residual = averaged(shares, b, [u.payload.tensors[p.a].double() for u in updates])
        found[p.weight] = mean.plus(residual)
    assert relative_gap(found, learned(algorithm, updates)) <= 1e-12


def test_exact_in_fp32_in_the_second_round_too():
    """The first round's residual stays in the base weights; the second adds its own."""
    algorithm = server("fedex_lora")
    assert gap_after(algorithm, drawn(algorithm, 1)) <= 1e-6
    earlier = {w: LowRank(d.b.double(), d.a.double()) for w, d in algorithm.delta._low.items()}
    updates = drawn(algorithm, 2)
    exact = {w: low.plus(earlier[w]) for w, low in learned(algorithm, updates).items()}
    algorithm.aggregate(iter(updates))
    assert relative_gap(result(algorithm), exact) <= 1e-6


def test_the_factors_are_fedit_s_and_the_residual_is_its_gap():
    algorithm, plain = server("fedex_lora"), server("fedit")
    updates = drawn(algorithm)
    assert algorithm.aggregate(iter(updates))["residual"] == pytest.approx(plain.aggregate(iter(updates))["gap"], 1e-6)
    assert torch.allclose(algorithm.shared.flat, plain.shared.flat, atol=1e-8)


def test_without_alpha_over_r_the_residual_is_wrong():
    algorithm = server("fedex_lora")
    updates = drawn(algorithm)
    exact = learned(algorithm, updates)
    algorithm.scales = dict.fromkeys(algorithm.scales, 1.0)
    algorithm.aggregate(iter(updates))
    assert relative_gap(result(algorithm), exact) >= 1e-3


def test_one_client_leaves_no_delta_and_its_own_bits():
    algorithm = server("fedex_lora")
    _, update, _ = drawn(algorithm)
    algorithm.aggregate(iter([update]))
    assert algorithm.deployed().base_delta == {}
    assert all(torch.equal(t, update.payload.tensors[n]) for n, t in algorithm.shared.views.items())


def test_the_residual_has_the_rank_that_the_clients_give_it():
    algorithm = server("fedex_lora", of=models(rank=2))
    algorithm.aggregate(iter(drawn(algorithm)))
    assert {t.shape[1] for n, t in algorithm.delta.tensors().items() if n.endswith(".B")} == {2 * (3 - 1)}
