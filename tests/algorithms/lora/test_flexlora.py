"""FlexLoRA: what is lost is the tail of the singular values, for every client's rank."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.lora.flexlora import split
from fedloom.models.lowrank import LowRank, relative_gap
from tests.helpers.lora_rounds import ALPHA, RANK, drawn, learned, result, server

SCALE = ALPHA / RANK


@pytest.mark.parametrize("ranks", [None, {"a": 1, "b": 2}])
def test_the_error_is_the_tail_eckart_young(ranks):
    algorithm = server("flexlora", ranks)
    updates = drawn(algorithm)
    exact = learned(algorithm, updates)
    metrics = algorithm.aggregate(iter(updates))
    lost = size = 0.0
    for p in algorithm.pairs:
        values = torch.linalg.svdvals(exact[p.weight].dense())
        for name, rank in {"a": (ranks or {}).get("a", RANK), "b": (ranks or {}).get("b", RANK), "c": RANK}.items():
            sent = algorithm.round_payload(name).tensors
            assert sent[p.a].shape[0] == sent[p.b].shape[1] == rank
            error = exact[p.weight].dense() - SCALE * sent[p.b].double() @ sent[p.a].double()
            assert float(error.norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-5)
        lost, size = lost + float(values[RANK:].norm() ** 2), size + float(values.norm() ** 2)
    assert metrics["truncated"] == pytest.approx((lost / size) ** 0.5, rel=1e-5)


def test_nothing_is_lost_where_the_rank_is_enough():
    algorithm = server("flexlora")
    update = drawn(algorithm)[0]
    exact = learned(algorithm, [update])
    algorithm.aggregate(iter([update]))
    assert relative_gap(result(algorithm), exact) <= 1e-6


def test_no_dense_product_is_formed(monkeypatch):
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("a dense out × in matrix"))
    svd, largest = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **k: largest.append(max(m.shape)) or svd(m, **k))
    algorithm = server("flexlora")
    algorithm.aggregate(iter(drawn(algorithm)))
    assert max(largest) <= 3 * RANK


def test_a_direction_without_a_singular_value_can_still_learn():
    """Truncation alone would leave a zero row of A beside a zero column of B, which no gradient ever moves."""
    algorithm = server("flexlora", {"a": 1})
    update = drawn(algorithm)[0]  # rank 1 alone in this round
    algorithm.aggregate(iter([update]))
    first = algorithm.model.initial_adapter().views
    for p in algorithm.pairs:
        assert not algorithm.shared.views[p.b][:, 1:].any()
        assert torch.equal(algorithm.shared.views[p.a][1:], first[p.a][1:])


def test_split_of_nothing_is_the_first_adapter():
    unused = torch.ones(3, 5, dtype=torch.float64)
    kept = split(LowRank(torch.zeros(4, 3, dtype=torch.float64), unused), unused)
    assert torch.equal(kept.a, unused) and not kept.b.any()
