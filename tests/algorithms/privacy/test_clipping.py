"""The clip, the split of one noise multiplier between vectors and count, and the clip that follows a quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedloom.algorithms.privacy import clipping
from fedloom.common.errors import UserError
from fedloom.recipe.privacy import AdaptiveConfig, PrivacyConfig


def test_a_vector_within_the_clip_stays_and_a_longer_one_is_scaled():
    short, long = torch.tensor([0.3, -0.4]), torch.tensor([3.0, -4.0])
    assert torch.equal(clipping.clipped(short, 0.5 + 1e-7), short.double())
    assert torch.allclose(clipping.clipped(long, 0.5), torch.tensor([0.3, -0.4], dtype=torch.float64), atol=1e-15)


def test_the_norm_does_not_depend_on_the_threads():
    flat = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    norms = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norms.append(clipping.norm_of(flat))
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(float(flat.double().norm()), rel=1e-12)


@pytest.mark.parametrize(("noise", "count"), [(1.0, None), (1.0, 0.51), (0.3, 5.0), (0.0, None)])
def test_vector_and_count_together_are_one_release_of_the_noise_asked_for(noise, count):
    """1/z² = (C / z_Δ C)² + (½ / σ_b)²: what one client changes, over the noise, in both at once."""
    privacy = PrivacyConfig(noise=noise, adaptive=AdaptiveConfig(noise=count))
    d = clipping.deviations(privacy, expected=10)
    if noise == 0:
        assert (d.vector, d.count) == (0.0, 0.0)
        return
    assert d.vector**-2 + (0.5 / d.count) ** 2 == pytest.approx(noise**-2)
    if count is None:
        assert d.count >= 2 * noise and d.vector / noise < 1.033
    assert clipping.deviations(PrivacyConfig(noise=noise), 10) == clipping.Deviations(noise, None)


def test_the_counts_noise_is_the_papers_where_clients_are_many():
    assert clipping.count_noise(AdaptiveConfig(), 1.0, 1000) == 50
    assert clipping.count_noise(AdaptiveConfig(), 1.0, 10) == 2


@pytest.mark.parametrize("count", [0.5, 0.1, 0.0])
def test_a_count_that_would_spend_everything_is_refused(count):
    with pytest.raises(UserError, match=r"set it above 0\.5"):
        clipping.deviations(PrivacyConfig(noise=1.0, adaptive=AdaptiveConfig(noise=count)), 10)


@pytest.mark.parametrize(("quantile", "start"), [(0.5, 0.01), (0.5, 50.0), (0.8, 1.0)])
def test_the_clip_converges_to_the_quantile_of_the_norms(quantile, start):
    """Norms from a log-normal distribution, 400 clients a round, the count with the paper's noise."""
    draw = np.random.default_rng(7)
    adaptive = AdaptiveConfig(quantile=quantile, lr=0.2)
    clip, path = start, []
    for _ in range(200):
        norms = draw.lognormal(mean=0.7, sigma=0.5, size=400)
        bits = float(((norms <= clip) - 0.5).sum() + draw.normal(0, clipping.count_noise(adaptive, 1.0, 400)))
        clip = clipping.moved(clip, adaptive, 0.5 + bits / 400)
        path.append(clip)
    expected = stats.lognorm.ppf(quantile, s=0.5, scale=math.exp(0.7))
    assert np.mean(path[-60:]) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("numel", [1, 30, 100_000])
def test_honest_noise_hardly_ever_passes_the_servers_bound(numel):
    bound = clipping.largest_honest(2.0, 3.0, numel)
    assert stats.chi.sf((bound - 2.0) / 3.0, numel) < 1e-12
    assert bound < 2.0 + 3.0 * (math.sqrt(numel) + 8)  # and is not far above it


def test_the_counts_noise_grows_with_the_noise_and_is_the_recipe_s_where_it_says_so():
    """Noise other than 1, whose double and whose half differ."""
    assert clipping.count_noise(AdaptiveConfig(), 3.0, 10) == 6.0
    assert clipping.count_noise(AdaptiveConfig(), 0.25, 10) == 0.5
    assert clipping.count_noise(AdaptiveConfig(), 0.25, 20) == 1.0
    assert clipping.count_noise(AdaptiveConfig(), 0.0, 1000) == 0.0
    assert clipping.count_noise(AdaptiveConfig(noise=7.5), 3.0, 1000) == 7.5
    assert clipping.count_noise(AdaptiveConfig(noise=7.5), 0.0, 10) == 7.5


def test_deviations_by_hand():
    """z = 3 and a count's noise of 6: the vectors get (1/9 − 1/144)^(−1/2)."""
    adaptive = PrivacyConfig(noise=3.0, adaptive=AdaptiveConfig())
    assert clipping.deviations(adaptive, 10).count == 6.0
    assert clipping.deviations(adaptive, 10).vector == pytest.approx((1 / 9 - 1 / 144) ** -0.5, rel=1e-12)
    assert clipping.deviations(PrivacyConfig(noise=3.0), 10) == clipping.Deviations(3.0, None)
    free = PrivacyConfig(noise=0.0, adaptive=AdaptiveConfig())
    assert clipping.deviations(free, 10) == clipping.Deviations(0.0, 0.0)


def test_the_clip_moves_towards_the_quantile():
    adaptive = AdaptiveConfig(lr=0.5, quantile=0.25)
    assert clipping.moved(2.0, adaptive, 0.25) == 2.0
    assert clipping.moved(2.0, adaptive, 0.75) == pytest.approx(2.0 * math.exp(-0.25))
    assert clipping.moved(2.0, adaptive, 0.0) == pytest.approx(2.0 * math.exp(0.125))


def test_a_vector_at_the_clip_is_not_touched():
    assert torch.equal(clipping.clipped(torch.tensor([3.0, -4.0]), 5.0), torch.tensor([3.0, -4.0], dtype=torch.float64))
    assert clipping.clipped(torch.zeros(2), 0.0).tolist() == [0.0, 0.0]
    assert clipping.clipped(torch.ones(2, dtype=torch.float32), 9.0).dtype == torch.float64
