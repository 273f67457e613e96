"""FedKSeed: the weights are w₀ − Σ a_j z_j for everybody, to the bit; messages are small whatever the model."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.low_traffic.directions import Direction, Directions
from fedloom.algorithms.low_traffic.fedkseed import pack, unpack
from fedloom.messages import wire
from fedloom.messages.types import Cost, Failure, Payload, Update
from tests.helpers.federation import Federation

MANY = {"train.steps": 6, "train.lr": 2e-2, "train.schedule": "constant"}


def fedkseed(recipe, folder, more=None, **options):
    return Federation(
        recipe({"algorithm": {"name": "fedkseed", "seeds": 64, **options}, **MANY, **(more or {})}), folder
    )


def test_two_clients_replay_to_identical_weights_and_so_does_the_server(tiny_recipe, tmp_path):
    """One followed every round in one process; the other comes in a fresh process after round 3, with a model of its own."""
    f = fedkseed(tiny_recipe, tmp_path)
    for number in (1, 2, 3):
        f.round(number, ["copy", "last"])
    followed = f.evaluated("copy", 3)
    late = f.process()
    f._met.discard("upper")
    f.send(f.assignment("evaluate", "upper", 3), late)
    assert late._model is not f.model
    assert torch.equal(late._model.adapter.flat, followed)
    assert torch.equal(f.server.deployed().adapter.flat, followed)
    assert not torch.equal(followed, f.model.initial)


def test_the_weights_are_the_sum_over_the_seeds(tiny_recipe, tmp_path):
    f = fedkseed(tiny_recipe, tmp_path)
    f.round(1)
    space = Directions(f.recipe.seed, f.model.adapter.layout.numel)
    exact = f.model.initial.double()
    for j, a in enumerate(f.server.coefficients.tolist()):
        exact = exact - a * space.dense(Direction(0, j)).double()
    assert torch.allclose(f.server.deployed().adapter.flat.double(), exact, atol=1e-8)


@pytest.mark.parametrize("seeds", [64, 2])
def test_one_client_alone_ends_where_its_own_steps_led(tiny_recipe, tmp_path, seeds):
    """Replaying what it sent gives the weights that it trained to, so signs, rates and seeds (used twice too) agree."""
    f = fedkseed(tiny_recipe, tmp_path, seeds=seeds)
    f.train("copy", 1)
    trained = f.live()
    f = fedkseed(tiny_recipe, tmp_path / "again", seeds=seeds)
    f.round(1, ["copy"])
    assert torch.allclose(f.server.deployed().adapter.flat, trained, atol=1e-7)
    assert (trained - f.model.initial).norm() > 0.01


def test_clients_count_by_their_examples(tiny_recipe, tmp_path):
    server = fedkseed(tiny_recipe, tmp_path).server
    one, two = torch.zeros(64), torch.zeros(64)
    one[3], two[3], two[5] = 1.0, 5.0, 8.0
    server.aggregate(iter([Update("a", 1, Payload(pack(one)), 1), Update("b", 1, Payload(pack(two)), 3)]))
    assert server.coefficients[3] == 4.0 and server.coefficients[5] == 6.0
    server.aggregate(iter([Update("a", 2, Payload(pack(one)), 7)]))
    assert server.coefficients[3] == 5.0 and server.coefficients.count_nonzero() == 2


@pytest.mark.parametrize("rank", [2, 16])
def test_a_round_moves_less_than_20_kilobytes_each_way_whatever_the_model(tiny_recipe, tmp_path, rank):
    """At K = 4096, every seed used, in whole messages, the recipe with the first; against the adapter's own size."""
    f = fedkseed(tiny_recipe, tmp_path, {"adapter.rank": rank}, seeds=4096)
    f.round(1)
    draw = torch.Generator().manual_seed(0)
    f.server.coefficients.copy_(1e-3 * torch.randn(4096, generator=draw))
    f._met.clear()
    for number in (2, 3):
        f.round(number)
        f.evaluate("copy", number)
    assert max(m.down_bytes for m in f.messages) < 20_000
    assert max(m.down_bytes for m in f.messages) > 4 * 4096  # all seeds were in it
    assert max(m.up_bytes for m in f.messages) < 2_000  # six steps
    full = Update(
        "c" * 100, 3, Payload(pack(f.server.coefficients.float())), 10**9, 10**9, {"loss": 1 / 3}, Cost(10**9)
    )
    assert len(wire.encode_outcome(full)) < 20_000


def test_pairs_and_plain_scalars_say_the_same():
    draw = torch.Generator().manual_seed(0)
    for used in (0, 1, 40, 66, 67, 99, 100):
        a = torch.zeros(100)
        a[torch.randperm(100, generator=draw)[:used]] = torch.randn(used, generator=draw)
        packed = pack(a)
        assert torch.equal(unpack(packed, 100), a)
        assert sum(t.numel() * t.element_size() for t in packed.values()) <= min(6 * used, 400)
        assert ("seeds" in packed) == (used <= 66)


SEEDS = torch.tensor([1, 2], dtype=torch.int16)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"scalars": torch.zeros(63)},
        {"seeds": SEEDS, "scalars": torch.zeros(3)},
        {"seeds": SEEDS + 62, "scalars": torch.zeros(2)},
        {"seeds": SEEDS - 2, "scalars": torch.zeros(2)},
        {"seeds": SEEDS.flip(0), "scalars": torch.zeros(2)},
        {"seeds": torch.zeros(2, dtype=torch.int16), "scalars": torch.zeros(2)},
        {"seeds": SEEDS, "scalars": torch.full((2,), 1e6)},
        {"scalars": torch.full((64,), float("nan"))},
        {"weights": torch.zeros(64)},
    ],
)
def test_an_update_that_is_none_is_refused(tiny_recipe, tmp_path, wrong):
    server = fedkseed(tiny_recipe, tmp_path).server
    with pytest.raises(ValueError):  # noqa: PT011
        server.accept(Update("a", 1, Payload(wrong), 1))


def test_coefficients_that_diverged_are_a_failure_of_the_client_not_of_the_program(tiny_recipe, tmp_path):
    f = fedkseed(tiny_recipe, tmp_path)
    f.server.coefficients[0] = 1e9
    outcome = f.send(f.assignment("train", "copy", 1))
    assert isinstance(outcome, Failure) and "train.lr" in outcome.detail


def test_the_servers_state_is_k_numbers(tiny_recipe, tmp_path):
    f = fedkseed(tiny_recipe, tmp_path)
    f.round(1)
    assert {n: tuple(t.shape) for n, t in f.server.server_state().tensors.items()} == {"coefficients": (64,)}
    assert not f.store.load("copy", 1)  # and a client's is nothing


def test_the_loss_falls(tiny_recipe, tmp_path):
    more = {"train.steps": 40, "train.lr": 1e-2, "train.batch_size": 8}
    f = fedkseed(tiny_recipe, tmp_path, more, seeds=4096)
    before = sum(f.evaluate(c, 0).metrics["loss_sum"] for c in f.clients)
    f.round(1)
    f.round(2)
    after = sum(f.evaluate(c, 2).metrics["loss_sum"] for c in f.clients)
    assert after < 0.98 * before
