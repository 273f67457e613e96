"""What is spent, against dp-accounting called directly, closed forms, and an integral taken by hand."""

from __future__ import annotations

import math
import sys

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld, rdp
from scipy import stats

from fedloom.algorithms.privacy import accounting
from fedloom.algorithms.privacy.accounting import Ledger
from fedloom.common.errors import UserError

DELTA = 1e-5
ADD_OR_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


def gaussian_delta(epsilon: float, noise: float) -> float:
    """δ(ε) of N(0, noise²) on a sum that one client changes by 1 (Balle and Wang, Theorem 8)."""
    mu = 1 / noise
    first = stats.norm.cdf(mu / 2 - epsilon / mu)
    return float(first - math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu)))


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (0.5, 3), (2.0, 40), (20.0, 1000)])
def test_without_sampling_it_is_the_closed_form_and_the_librarys(noise, rounds):
    epsilon = accounting.spent(noise, rounds, 1.0, DELTA)
    assert gaussian_delta(epsilon, noise / math.sqrt(rounds)) == pytest.approx(DELTA, rel=1e-6)
    assert epsilon == pytest.approx(accounting.spent(noise / math.sqrt(rounds), 1, 1.0, DELTA), rel=1e-9)
    library = pld.PLDAccountant(ADD_OR_REMOVE)
    library.compose(dp_accounting.GaussianDpEvent(noise), rounds)
    assert epsilon == pytest.approx(library.get_epsilon(DELTA), rel=2e-3)
    assert epsilon <= library.get_epsilon(DELTA)  # which rounds upwards


def test_releases_of_unequal_noise_compose_as_one_gaussian():
    ledger = Ledger()
    for noise in (1.0, 0.7, 0.7, 3.0):
        ledger.add(noise)
    together = (1 + 2 / 0.49 + 1 / 9) ** -0.5
    assert gaussian_delta(ledger.epsilon(DELTA), together) == pytest.approx(DELTA, rel=1e-6)


@pytest.mark.parametrize(("noise", "rate", "rounds"), [(1.0, 0.1, 1), (0.8, 0.05, 30), (2.0, 0.5, 20)])
def test_with_sampling_it_is_the_librarys(noise, rate, rounds):
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    tight, loose = pld.PLDAccountant(ADD_OR_REMOVE), rdp.RdpAccountant(neighboring_relation=ADD_OR_REMOVE)
    tight.compose(event, rounds)
    loose.compose(event, rounds)
    epsilon = accounting.spent(noise, rounds, rate, DELTA)
    assert epsilon == tight.get_epsilon(DELTA)
    assert 0 < epsilon < loose.get_epsilon(DELTA)  # Rényi's bound holds too, and is wider
    assert epsilon < accounting.spent(noise, rounds, 1.0, DELTA)


def test_one_sampled_release_by_an_integral():
    """δ(ε) = max over both directions of ∫ (P − e^ε Q)₊ with P = (1−q) N(0, z²) + q N(1, z²) and Q = N(0, z²)."""
    noise, rate = 0.9, 0.2
    epsilon = accounting.spent(noise, 1, rate, DELTA)
    x = np.linspace(-15, 16, 2_000_001)
    q = stats.norm.pdf(x, 0, noise)
    p = (1 - rate) * q + rate * stats.norm.pdf(x, 1, noise)
    both = [float(np.trapezoid(np.maximum(a - math.exp(epsilon) * b, 0), x)) for a, b in ((p, q), (q, p))]
    assert max(both) == pytest.approx(DELTA, rel=1e-2)
    assert max(both) <= DELTA


@pytest.mark.parametrize(("epsilon", "rounds", "rate"), [(8.0, 3, 1.0), (0.5, 100, 1.0), (2.0, 50, 0.1)])
def test_the_noise_for_a_target_keeps_it_and_hardly_less_would(epsilon, rounds, rate):
    noise = accounting.noise_for(epsilon, DELTA, rounds, rate)
    assert accounting.spent(noise, rounds, rate, DELTA) <= epsilon
    assert accounting.spent(0.998 * noise, rounds, rate, DELTA) > epsilon
    assert noise == float(f"{noise:.4g}")


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_targets_out_of_reach():
    assert accounting.noise_for(1e4, DELTA, 1, 1.0) == accounting.LEAST_NOISE
    with pytest.raises(UserError, match="cannot be kept with any useful noise"):
        accounting.noise_for(1e-9, 1e-12, 100, 1.0)


def test_a_ledger_merges_equal_releases_and_survives_a_checkpoint():
    ledger = Ledger()
    ledger.add(1.0, 0.25)
    ledger.add(1.0, 0.25, 2)
    ledger.add(1.0, 0.5)
    ledger.add(1.0, 0.5, 0)
    assert ledger.entries == [(3, 1.0, 0.25), (1, 1.0, 0.5)]
    assert ledger.releases == 4
    again = Ledger.of(ledger.tensor())
    assert again.entries == ledger.entries
    assert torch.equal(again.tensor(), ledger.tensor())
    assert Ledger.of(Ledger().tensor()).entries == []


def test_no_release_spends_nothing_and_one_without_noise_everything():
    ledger = Ledger()
    assert ledger.epsilon(DELTA) == 0
    ledger.add(1.0)
    ledger.add(0.0)
    assert ledger.epsilon(DELTA) == math.inf


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r'pip install "fedloom\[privacy\]"'):
        accounting.library()
