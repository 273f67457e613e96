"""LoRA-FAIR: B̄ moves towards what clients learned; λ says how far."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.lora.lora_fair import refined
from tests.helpers.lora_rounds import drawn, gap_after, server


def test_a_large_lambda_is_fedit_bit_for_bit():
    algorithm, plain = server("lora_fair", strength=1e30), server("fedit")
    updates = drawn(algorithm)
    algorithm.aggregate(iter(updates))
    plain.aggregate(iter(updates))
    assert torch.equal(algorithm.shared.flat, plain.shared.flat)


def test_a_small_lambda_comes_closer():
    gaps = []
    for strength in (1e30, 1.0, 0.01, 1e-9):
        algorithm = server("lora_fair", strength=strength)
        gaps.append(gap_after(algorithm, drawn(algorithm)))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < gaps[0]


@pytest.mark.parametrize("strength", [1e-12, 0.3])
def test_it_is_the_minimum(strength):
    """Against the dense problem, solved row by row by least squares: [Ā; √λ'·I]ᵀ · (ΔB)ᵀ ≈ [E; 0]ᵀ."""
    draw = torch.Generator().manual_seed(0)
    shares = [0.2, 0.3, 0.5]
    b, a = ([torch.randn(s, generator=draw, dtype=torch.float64) for _ in shares] for s in ((9, 3), (3, 7)))
    found = refined(shares, b, a, strength)
    b_mean, a_mean = (sum(p * x for p, x in zip(shares, xs, strict=True)) for xs in (b, a))
    exact = sum(p * x @ y for p, x, y in zip(shares, b, a, strict=True))
    ridge = strength * float((a_mean @ a_mean.T).trace()) / 3
    left = torch.cat([a_mean.T, ridge**0.5 * torch.eye(3, dtype=torch.float64)])
    right = torch.cat([(exact - b_mean @ a_mean).T, torch.zeros(3, 9, dtype=torch.float64)])
    expected = b_mean + torch.linalg.lstsq(left, right).solution.T
    assert torch.allclose(found.b, expected, atol=1e-10) and torch.equal(found.a, a_mean)
