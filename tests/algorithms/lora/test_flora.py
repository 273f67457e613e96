"""FLoRA: the merged weights are W + Σ p_k ΔW_k, at any ranks; α/r belongs to them."""

from __future__ import annotations

import pytest
import torch

from fedloom.models.lowrank import LowRank, relative_gap
from tests.helpers.lora_rounds import client, drawn, gap_after, learned, models, result, server, trained


@pytest.mark.parametrize("ranks", [None, {"a": 1, "b": 2}])
def test_stacking_is_exact(ranks):
    assert gap_after(server("flora", ranks), drawn(server("flora", ranks))) <= 1e-6


@pytest.mark.parametrize("ranks", [None, {"a": 1, "b": 2}])
def test_stacking_is_exact_in_float64(ranks):
    algorithm = server("flora", ranks)
    updates = drawn(algorithm)
    held = algorithm.held(updates)
    stacked = {p.weight: algorithm.total(held, p) for p in algorithm.pairs}
    assert relative_gap(stacked, learned(algorithm, updates)) <= 1e-12


def test_without_alpha_over_r_it_would_be_half_off():
    algorithm = server("flora")
    updates = drawn(algorithm)
    exact = learned(algorithm, updates)
    algorithm.scales = dict.fromkeys(algorithm.scales, 1.0)
    algorithm.aggregate(iter(updates))
    assert relative_gap(result(algorithm), exact) == pytest.approx(0.5, abs=1e-6)


def test_rounds_add_up_in_the_base_weights():
    of = models()
    algorithm = server("flora", of=of)
    weights = of.adapted().base_weights()
    expected = {p.weight: weights[p.weight].double().clone() for p in algorithm.pairs}
    for seed in range(4):
        updates = drawn(algorithm, seed)
        for weight, low in learned(algorithm, updates).items():
            expected[weight] += low.dense()
        algorithm.aggregate(iter(updates))
    of.adapted().set_base_delta(algorithm.deployed().base_delta)
    for weight, value in expected.items():
        assert (weights[weight].double() - value).abs().max() <= 1e-5
    assert not any(algorithm.deployed().adapter.views[p.b].any() for p in algorithm.pairs)


def test_clients_begin_afresh_and_the_same_after_a_restart():
    of = models()
    central, algorithm = server("flora", of=of), client("flora", of)
    central.aggregate(iter(drawn(central)))

    def start(name: str, round: int) -> torch.Tensor:
        algorithm.begin(name, round, None)
        algorithm.receive(central.round_payload(name))
        assert not any(algorithm.model.adapter.views[p.b].any() for p in algorithm.pairs)
        return torch.cat([algorithm.model.adapter.views[p.a].flatten() for p in algorithm.pairs])

    again = start("a", 1)
    assert torch.equal(start("a", 1), again)
    assert not torch.equal(start("b", 1), again) and not torch.equal(start("a", 2), again)
    bound = 32**-0.5
    assert again.abs().max() <= bound and again.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_no_factors_go_down():
    algorithm = server("flora")
    assert algorithm.round_payload("a").tensors == {}
    algorithm.aggregate(iter(drawn(algorithm)))
    assert all(n.startswith("delta/") for n in algorithm.round_payload("a").tensors)


def test_what_was_learned_is_what_is_merged():
    """One client, really trained: base plus delta is the client's own model."""
    of = models()
    central, algorithm = server("flora", of=of), client("flora", of)
    sent = trained(algorithm, central.round_payload("a"))
    views = {n: t.double().clone() for n, t in algorithm.model.adapter.views.items()}
    own = {p.weight: LowRank(2.0 * views[p.b], views[p.a]) for p in algorithm.pairs}
    update = drawn(central)[0]
    central.aggregate(iter([type(update)("a", 1, sent, num_examples=7)]))
    assert relative_gap(result(central), own) <= 1e-6
