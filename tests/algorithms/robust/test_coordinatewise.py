"""The median and the trimmed mean of each number, by hand, for few clients and over the ends of blocks."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.robust import coordinatewise as module
from fedloom.algorithms.robust.coordinatewise import count_of, median
from tests.helpers import averaging_rounds as rounds


def trimmed(values: list[float], trim: float) -> tuple[list[float], float]:
    algorithm = rounds.made("trimmed_mean", trim=trim)
    result, metrics = algorithm.combine([torch.tensor([v, -v]) for v in values])
    return result.tolist(), metrics["trimmed"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], 5.0),
        ([5.0, 1.0], 3.0),
        ([9.0, 1.0, 2.0], 2.0),
        ([9.0, 1.0, 2.0, 4.0], 3.0),
        ([1e30, 1.0, 2.0, 3.0, -1e30], 2.0),
    ],
)
def test_the_median(values, expected):
    assert median([torch.tensor([v, -v]) for v in values]).tolist() == [expected, -expected]


@pytest.mark.parametrize(
    ("values", "trim", "mean", "left_out"),
    [
        ([5.0], 0.49, 5.0, 0),  # never down to nothing
        ([5.0, 1.0], 0.49, 3.0, 0),
        ([9.0, 1.0, 2.0], 0.49, 2.0, 1),
        ([9.0, 1.0, 2.0], 0.0, 4.0, 0),
        ([9.0, 1.0, 2.0, 4.0], 0.49, 3.0, 1),
        ([9.0, 1.0, 2.0, 4.0, 6.0], 0.49, 4.0, 2),
        ([9.0, 1.0, 2.0, 4.0, 6.0], 0.2, 4.0, 1),
        ([0.0, 9.0, 1.0, 2.0, 4.0, 6.0], 0.2, 3.0, 2),
    ],
)  # fmt: skip
def test_the_mean_without_the_extremes(values, trim, mean, left_out):
    assert trimmed(values, trim) == ([mean, -mean], left_out)


def test_a_share_of_clients_is_rounded_up_but_not_for_rounding_s_sake():
    assert [count_of(0.2, n) for n in (0, 1, 4, 5, 6, 10, 11)] == [0, 1, 1, 1, 2, 2, 3]
    assert count_of(0.1, 30) == 3  # 0.1 · 30 is a little over 3 in floating point
    assert count_of(0.0, 30) == 0


def test_blocks_of_columns_change_nothing(monkeypatch):
    rows = [torch.randn(11, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    whole = median(rows)
    seen = []
    monkeypatch.setattr(module, "COLUMNS", 4)
    parts = module.coordinatewise(rows, lambda columns: seen.append(tuple(columns.shape)) or columns[2])
    assert torch.equal(parts, whole)
    assert seen == [(5, 4), (5, 4), (5, 3)], "no more than so many columns are looked at together"
    assert whole.dtype == torch.float32
    with pytest.raises(ValueError, match="zip"):
        module.coordinatewise([rows[0], rows[1][:4]], lambda columns: columns[0])


def test_no_updates_have_no_median():
    with pytest.raises(ValueError, match="there are no updates to aggregate"):
        rounds.server("median").aggregate(iter([]))
