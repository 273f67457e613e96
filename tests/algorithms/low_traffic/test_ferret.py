"""Ferret: coordinates in random bases; unbiased or nearest, and nearer with more bases."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fedloom.algorithms.low_traffic.directions import BLOCK, Directions
from fedloom.algorithms.low_traffic.ferret import Ferret
from fedloom.messages.types import Payload, Update
from fedloom.recipe.recipe import AdapterConfig
from tests.helpers.federation import Federation

SIZE = 2 * BLOCK + 300


def made(size=SIZE, **options):
    """The client half over a buffer of `size`, no model needed."""
    algorithm = Ferret(Ferret.Options(**options), 3, AdapterConfig())
    algorithm.space = Directions(3, size)
    algorithm.round = 1
    return algorithm


def rebuilt(algorithm, delta):
    """V a."""
    out = torch.zeros(len(delta), dtype=torch.float64)
    a = algorithm.coordinates(delta).double()
    for direction, value in zip(algorithm.directions(algorithm.round, len(a)), a, strict=True):
        for where, z in algorithm.space.pieces(direction):
            out[where] += value * z.double()
    return out


def delta(size=SIZE):
    return 1e-3 * torch.randn(size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("coordinates", ["unbiased", "projection"])
def test_the_error_falls_with_more_bases(coordinates):
    """As the two formulas of the module say: √(d/K) and √(1 − K/d) times the size, d and K of the whole as of a group."""
    d = delta()
    errors = []
    for bases in (40, 160, 640):
        error = float((rebuilt(made(bases=bases, coordinates=coordinates), d) - d.double()).norm() / d.norm())
        expected = (SIZE / bases) ** 0.5 if coordinates == "unbiased" else (1 - bases / SIZE) ** 0.5
        assert error == pytest.approx(expected, rel=0.25 if coordinates == "unbiased" else 0.02)
        errors.append(error)
    assert errors[0] > errors[1] > errors[2]


def test_the_unbiased_coordinates_are_right_on_average():
    """Mean over 100 rounds, each with bases of its own: the error falls by √100, and the length is right."""
    d = delta(500)
    total = torch.zeros(500, dtype=torch.float64)
    algorithm = made(500, bases=64)
    for round in range(1, 101):
        algorithm.round = round
        total += rebuilt(algorithm, d)
    mean = total / 100
    assert float(mean @ d.double() / d.double().square().sum()) == pytest.approx(1, abs=0.1)
    assert float((mean - d.double()).norm() / d.norm()) == pytest.approx((500 / 64 / 100) ** 0.5, rel=0.25)


def test_as_many_bases_as_numbers_lose_nothing():
    d = delta(200)
    assert torch.allclose(rebuilt(made(200, bases=200, coordinates="projection"), d), d.double(), atol=1e-8)
    assert torch.allclose(rebuilt(made(200, bases=300, coordinates="projection"), d), d.double(), atol=1e-8)


def test_every_part_of_the_buffer_has_its_share_of_bases():
    for size in (100, BLOCK, BLOCK + 1, 2 * BLOCK - 1, SIZE, 7 * BLOCK + 300):
        for bases in (1, 2, 3, 7, 8, 12, 100):
            algorithm = made(size, bases=bases)
            covered: dict = {}
            for direction in algorithm.directions(1, bases):
                covered[direction[2:]] = covered.get(direction[2:], 0) + 1
            parts = sorted(covered)
            assert parts[0][0] == 0 and parts[-1][1] == algorithm.space.blocks
            assert all(a[1] == b[0] for a, b in pairwise(parts))
            for (start, stop), count in covered.items():
                numbers = min(stop * BLOCK, size) - start * BLOCK
                assert abs(count - bases * numbers / size) <= 1


def test_the_server_reconstructs_the_mean_of_the_updates(tiny_recipe, tmp_path):
    """Enough bases that nothing is lost: exactly FedAvg's result, from 4·K bytes a client."""
    more = {"adapter.target_modules": ["q_proj"], "adapter.rank": 1}
    plain = Federation(tiny_recipe(more), tmp_path / "fedavg")
    options = {"name": "ferret", "bases": 256, "coordinates": "projection"}
    ferret = Federation(tiny_recipe({"algorithm": options, **more}), tmp_path / "ferret")
    assert plain.model.adapter.layout.numel == 128
    for number in (1, 2):
        plain.round(number)
        ferret.round(number)
        moved = (plain.server.shared.flat - plain.model.initial).norm()
        assert (ferret.server.deployed().adapter.flat - plain.server.shared.flat).norm() < 1e-4 * moved


def test_it_learns_and_a_client_that_was_away_catches_up(tiny_recipe, tmp_path):
    more = {"train.steps": 8, "train.batch_size": 8, "train.schedule": "constant"}
    f = Federation(tiny_recipe({"algorithm": {"name": "ferret", "bases": 512}, **more}), tmp_path)
    before = sum(f.evaluate(c, 0).metrics["loss_sum"] for c in f.clients)
    f.round(1)
    f.round(2, ["copy", "last"])
    ends = [f.evaluated(c, 2) for c in f.clients]
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[0], f.server.deployed().adapter.flat)
    assert sum(f.evaluate(c, 2).metrics["loss_sum"] for c in f.clients) < 0.95 * before
    assert max(m.up_bytes for m in f.messages) < 4 * 512 + 1_000
    assert not any(len(m.up.tensors) for m in f.messages if m.kind == "evaluate")


def test_the_server_goes_as_far_as_it_is_told(tiny_recipe, tmp_path):
    ends = []
    for rate in (1.0, 0.5):
        f = Federation(
            tiny_recipe({"algorithm": {"name": "ferret", "bases": 64, "server_lr": rate}}), tmp_path / str(rate)
        )
        f.round(1)
        ends.append(f.server.deployed().adapter.flat - f.model.initial)
    assert torch.allclose(ends[1], 0.5 * ends[0], atol=1e-7)


def test_the_wrong_number_of_coordinates_is_refused(tiny_recipe, tmp_path):
    server = Federation(tiny_recipe({"algorithm": {"name": "ferret", "bases": 64}}), tmp_path).server
    with pytest.raises(ValueError, match="64 bases"):
        server.accept(Update("a", 1, Payload({"scalars": torch.zeros(63)}), 1))
