"""Directions are the same everywhere, and a sum of them does not depend on how one came to it."""

from __future__ import annotations

import random

import pytest
import torch

from fedloom.algorithms.low_traffic.directions import BLOCK, UNITS, Direction, Directions, Replay, check_coefficients

SIZE = 2 * BLOCK + 100
SPACE = Directions(7, SIZE)


def start():
    return 0.02 * torch.randn(SIZE, generator=torch.Generator().manual_seed(1))


def coefficients(count, seed=0):
    draw = random.Random(seed)
    return {Direction(0, j): float(torch.tensor(draw.gauss(0, 1e-3))) for j in range(count)}


def test_any_part_can_be_drawn_alone_and_on_any_number_of_threads():
    whole = SPACE.dense(Direction(3, 5))
    part = SPACE.dense(Direction(3, 5, 1, 2))
    torch.set_num_threads(2)
    again = Directions(7, SIZE).dense(Direction(3, 5))
    assert torch.equal(whole, again)
    assert torch.equal(whole[BLOCK : 2 * BLOCK], part)
    assert torch.equal(Directions(7, 100).dense(Direction(3, 5)), whole[:100])  # of a smaller buffer: the beginning


def test_directions_are_normal_and_have_nothing_to_do_with_each_other():
    drawn = torch.stack([SPACE.dense(Direction(r, j)) for r in (0, 1) for j in (0, 1)])
    drawn = torch.cat([drawn, Directions(8, SIZE).dense(Direction(0, 0))[None], drawn[:1].roll(BLOCK)])
    gram = drawn @ drawn.T / SIZE
    assert torch.allclose(gram, torch.eye(len(drawn)), atol=5 / SIZE**0.5)
    assert drawn.mean(dim=1).abs().max() < 5 / SIZE**0.5


def test_a_replay_is_the_sum():
    wanted = coefficients(50)
    exact = start().double() - sum(a * SPACE.dense(d).double() for d, a in wanted.items())
    assert torch.allclose(Replay(SPACE, start()).at(wanted).double(), exact, atol=2e-9)
    assert torch.equal(Replay(SPACE, start()).at({}), start())


def test_every_way_to_the_same_coefficients_ends_with_the_same_bits():
    """At once, in rounds, backwards, by a detour with other coefficients: float addition fails each of these."""
    wanted = coefficients(200)
    items = list(wanted.items())
    at_once = Replay(SPACE, start()).at(wanted)
    in_rounds, detour = Replay(SPACE, start()), Replay(SPACE, start())
    for count in range(20, 201, 20):
        followed = in_rounds.at(dict(items[:count]))
    detour.at(coefficients(230, seed=9))
    assert torch.equal(at_once, followed)
    assert torch.equal(at_once, Replay(SPACE, start()).at(dict(reversed(items))))
    assert torch.equal(at_once, detour.at(wanted))
    assert torch.equal(at_once, detour.at(wanted))  # and it stays there


def test_float_addition_would_not():
    """The control: what the test above would have to tell apart."""
    wanted = list(coefficients(200).items())
    forwards, backwards = start(), start()
    for d, a in wanted:
        forwards -= a * SPACE.dense(d)
    for d, a in reversed(wanted):
        backwards -= a * SPACE.dense(d)
    assert not torch.equal(forwards, backwards)


def test_sums_of_the_largest_coefficients_stay_inside_64_bits():
    assert 4096 * 7 * UNITS * 256 < 2**63  # 256 of them at seven standard deviations


@pytest.mark.parametrize(
    "wrong", [torch.tensor([5000.0]), torch.tensor([float("nan")]), torch.zeros(2, 2), torch.zeros(2).double()]
)
def test_what_a_sum_cannot_take_is_refused(wrong):
    with pytest.raises(ValueError, match="coefficient"):
        check_coefficients(wrong)
