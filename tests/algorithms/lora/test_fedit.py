"""FedIT: the mean of both factors, and the gap that it leaves, logged."""

from __future__ import annotations

import pytest
import torch

from fedloom.models.lowrank import relative_gap
from tests.helpers.lora_rounds import drawn, gap_after, learned, result, server


def test_factors_are_averaged_by_examples():
    algorithm = server("fedit")
    updates = drawn(algorithm)
    algorithm.aggregate(iter(updates))
    for name, view in algorithm.shared.views.items():
        a, b, c = (u.payload.tensors[name].double() for u in updates)
        assert torch.allclose(view.double(), (a + 3 * b + 4 * c) / 8, atol=1e-8)


def test_the_gap_is_logged_as_it_is():
    algorithm = server("fedit")
    updates = drawn(algorithm)
    exact = learned(algorithm, updates)
    metrics = algorithm.aggregate(iter(updates))
    dense = {w: low.dense() for w, low in exact.items()}
    wrong = sum(float((result(algorithm)[w].dense() - dense[w]).norm() ** 2) for w in dense)
    assert metrics["gap"] == pytest.approx((wrong / sum(float(d.norm() ** 2) for d in dense.values())) ** 0.5, rel=1e-9)
    assert metrics["gap"] == pytest.approx(relative_gap(result(algorithm), exact), rel=1e-9)
    assert metrics["gap"] >= 1e-3  # the control of the exact ones


def test_identical_clients_leave_no_gap():
    algorithm = server("fedit")
    first, *_ = drawn(algorithm)
    same = [type(first)(c, 1, first.payload, num_examples=n) for c, n in (("a", 1), ("b", 5))]
    assert gap_after(algorithm, same) <= 1e-7
