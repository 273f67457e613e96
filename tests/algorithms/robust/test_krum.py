"""Krum's scores by hand: who stands closest, ties, and how many may be taken for hostile among few."""

from __future__ import annotations

import math

import pytest
import torch

from fedloom.algorithms.robust import coordinatewise
from fedloom.algorithms.robust.krum import distance, ranking
from tests.helpers import averaging_rounds as rounds


def rows(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v, 0.0]) for v in values]


def test_distances_are_exact_beside_a_client_that_is_far_too_large(monkeypatch):
    one, other = torch.tensor([3.0, 4.0, 1e6, 2.0, 0.0]), torch.tensor([0.0, 0.0, 1e6, 0.0, 1.0])
    expected = math.sqrt(9 + 16 + 4 + 1)
    assert distance(one, other) == pytest.approx(expected, rel=1e-15)
    monkeypatch.setattr(coordinatewise, "COLUMNS", 2)
    assert distance(one, other) == pytest.approx(expected, rel=1e-15)


def test_scores_are_squares_over_the_closest_others():
    """0, 1, 3 and 10. Over two others: 0 has 1 + 9, 1 has 1 + 4, 3 has 4 + 9, 10 has 49 + 81."""
    assert ranking(rows(0.0, 1.0, 3.0, 10.0), 2) == [1, 0, 2, 3]
    # over all three: 110, 86, 62, 230
    assert ranking(rows(0.0, 1.0, 3.0, 10.0), 3) == [2, 1, 0, 3]


def test_of_two_that_are_closest_to_each_other_the_next_neighbour_decides():
    """Over one other, 0 and 1 tie with 1; 1 is closer to 3."""
    assert ranking(rows(0.0, 1.0, 3.0, 10.0), 1)[0] == 1
    assert ranking(rows(1.0, 0.0, 3.0, 10.0), 1)[0] == 0
    assert ranking(rows(0.0, 1.0, 3.0, 10.0), 0) == ranking(rows(0.0, 1.0, 3.0, 10.0), 1)


@pytest.mark.parametrize(
    ("clients", "hostile", "keep", "assumed", "kept"),
    [
        (1, 0.2, 1, 0, 1), (2, 0.2, 1, 0, 2), (3, 0.2, 1, 0, 1), (4, 0.49, 1, 0, 1), (5, 0.2, 1, 1, 1), (5, 0.49, 9, 1, 4),
        (6, 0.49, 1, 1, 1), (7, 0.49, 3, 2, 3), (7, 0.0, 9, 0, 7), (9, 0.2, 9, 2, 7), (3, 0.2, 9, 0, 3),
    ],
)  # fmt: skip
def test_of_few_clients_only_as_many_are_hostile_as_the_guarantee_allows(clients, hostile, keep, assumed, kept):
    algorithm = rounds.made("krum", hostile=hostile, keep=keep)
    given = rows(*(float(i * i) for i in range(clients)))
    result, metrics = algorithm.combine(given)
    assert metrics == {"assumed_hostile": assumed, "kept": kept}
    chosen = ranking(given, max(1, clients - assumed - 2))[:kept]
    assert result.tolist() == pytest.approx([sum(float(i * i) for i in chosen) / kept, 0.0])
    assert result.dtype == torch.float32
    if clients > 2:
        assert len(chosen) == kept


def test_one_far_away_is_not_chosen_and_does_not_move_the_result():
    algorithm = rounds.made("krum")
    honest = rows(1.0, 1.1, 0.9, 1.05)
    for attack in (1e6, -1e30, 5.0):
        result, _ = algorithm.combine([*honest, torch.tensor([attack, attack])])
        assert any(torch.equal(result, row) for row in honest)
