"""Top-k and random-k against plain Python: which elements travel, how their places are written, and in how many bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.messages.operators.sparsify import from_bits, from_gaps, largest, to_bits, to_gaps
from fedloom.messages.types import Payload
from tests.helpers.payloads import chain_of, of


def through(values: torch.Tensor, seed: int = 0, **options) -> tuple[Payload, torch.Tensor]:
    chain = chain_of({"name": "sparsify", **options})
    made = chain.encode(Payload({"w": values}), torch.Generator().manual_seed(seed))
    return made, chain.decode(made).tensors["w"]


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.0, 0.5, 1e-45]), min_size=1, max_size=60), st.data())
@settings(max_examples=150, deadline=None)
def test_exactly_the_k_largest_are_kept_and_of_equal_ones_the_first(values, data):
    count = data.draw(st.integers(1, len(values)))
    got = largest(torch.tensor(values), count).tolist()
    assert got == sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:count])


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.124, 0.126, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 7, 1000, 5003])
def test_what_is_kept_is_exact_and_the_rest_is_zero(fraction, count):
    values = of(torch.float32, (count,))
    made, got = through(values, fraction=fraction)
    kept = math.ceil(fraction * count)
    assert int((got != 0).sum()) == len(made.tensors["F32.values"]) == kept
    assert torch.equal(got[got != 0], values[got != 0])
    assert kept == count or float(values[got == 0].abs().max()) <= float(got[got != 0].abs().min())
    assert len(made.tensors["F32.index"]) <= min(math.ceil(count / 8), kept + count // 255)


@given(st.integers(1, 3000), st.data())
@settings(max_examples=80, deadline=None)
def test_places_come_back_from_both_codings(count, data):
    where = torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1), max_size=30))), dtype=torch.int64)
    assert from_gaps(to_gaps(where), len(where), count).tolist() == where.tolist()
    assert from_bits(to_bits(where, count), len(where), count).tolist() == where.tolist()
    by_hand, last = [], -1
    for place in where.tolist():
        gap = place - last - 1
        by_hand += [255] * (gap // 255) + [gap % 255]
        last = place
    assert to_gaps(where).tolist() == by_hand
    assert len(by_hand) <= len(where) + count // 255


def test_the_dense_index_is_one_bit_for_each_element():
    assert to_bits(torch.tensor([0, 1, 9]), 10).tolist() == [0b11, 0b10]


def test_of_random_k_only_a_seed_travels():
    values = of(torch.float32, (5000,))
    made, got = through(values, method="random_k", fraction=0.1)
    assert set(made.tensors) == {"F32.values"}
    assert [set(n) for n in made.coding["notes"]] == [{"seed"}]
    assert int((got != 0).sum()) == 500
    assert torch.equal(got[got != 0], values[got != 0])
    _, other = through(values, seed=1, method="random_k", fraction=0.1)
    assert 10 < int(((got != 0) & (other != 0)).sum()) < 100  # 50 expected of two draws


def test_rescaled_random_k_is_right_in_the_mean():
    values = torch.tensor([1.0, -2.0, 0.5, 4.0] * 25)
    draws = (
        torch.stack([through(values, s, method="random_k", fraction=0.25, rescale=True)[1] for s in range(400)])
        .view(-1, 4)
        .double()
    )
    error = (draws.mean(0) - values[:4].double()).abs()
    assert bool((error <= 5 * draws.std(0) / 100).all()), error
    plain = torch.stack([through(values, s, method="random_k", fraction=0.25)[1] for s in range(20)]).view(-1, 4)
    assert float(plain.mean(0)[3]) < 2.0  # a quarter of 4, give or take


def test_rescaling_goes_with_random_k_alone():
    for options in ({}, {"method": "random_k", "error_feedback": True}):
        with pytest.raises(ValueError, match="leave it out"):
            through(torch.ones(3), rescale=True, **options)
