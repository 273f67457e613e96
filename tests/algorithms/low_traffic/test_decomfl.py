"""DeComFL: rounds of scalars along shared directions; who was away replays what was missed, to the bit."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.low_traffic.directions import Direction, Directions
from fedloom.algorithms.low_traffic.history import History
from fedloom.messages.types import Failure, Payload, Update
from tests.helpers.federation import Federation

MANY = {"train.steps": 4, "train.lr": 2e-2, "train.schedule": "constant"}


def decomfl(recipe, folder, more=None, **options):
    return Federation(recipe({"algorithm": {"name": "decomfl", **options}, **MANY, **(more or {})}), folder)


def test_a_client_absent_for_three_rounds_catches_up_bit_for_bit(tiny_recipe, tmp_path):
    """`upper` trains in round 1, is away in rounds 2 to 4, and comes back in a process that remembers nothing."""
    f = decomfl(tiny_recipe, tmp_path)
    f.round(1)
    for number in (2, 3, 4):
        f.round(number, ["copy", "last"])
    followed = f.evaluated("copy", 4)
    back = f.process()
    assignment = f.assignment("train", "upper", 5)
    assert assignment.payload.tensors["counts"].tolist() == [4] * 4  # rounds 1 to 4: it started round 1 with none
    starts: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        training = type(f.server).local_training
        patch.setattr(
            type(f.server), "local_training",
            lambda s, run: (starts.append(run.model.adapter.flat.clone()), training(s, run))[1],
        )  # fmt: skip
        back._configure(f.recipe.resolved())
        outcome = f.send(assignment, back)
    assert isinstance(outcome, Update), outcome
    assert torch.equal(starts[0], followed)
    assert torch.equal(f.server.deployed().adapter.flat, followed)


def test_only_what_was_missed_is_sent(tiny_recipe, tmp_path):
    f = decomfl(tiny_recipe, tmp_path, perturbations=2)
    f.round(1)
    f.round(2, ["copy"])
    f.round(3)
    sent = {(m.client, m.round): (int(m.down.tensors["held"]), len(m.down.tensors["counts"])) for m in f.messages}
    assert sent["copy", 1] == (0, 0)
    assert sent["copy", 2] == (0, 1)
    assert sent["copy", 3] == (1, 1)  # it has seen round 1, and misses round 2, its own scalars included
    assert sent["last", 3] == (0, 2)
    f.evaluate("last", 3)
    assert int(f.messages[-1].down.tensors["held"]) == 2


def test_a_round_is_the_mean_along_shared_directions(tiny_recipe, tmp_path):
    f = decomfl(tiny_recipe, tmp_path, perturbations=2)
    updates = f.round(1)
    mean = sum(u.num_examples * u.payload.tensors["scalars"].double() for u in updates)
    mean = mean / sum(u.num_examples for u in updates)
    space = Directions(f.recipe.seed, f.model.adapter.layout.numel)
    exact = f.model.initial.double()
    for number, a in enumerate(mean.tolist()):
        exact = exact - a * space.dense(Direction(1, number)).double()
    assert torch.allclose(f.server.deployed().adapter.flat.double(), exact, atol=1e-8)


def test_it_equals_averaging_the_weights_that_clients_trained(tiny_recipe, tmp_path):
    """Σ p_k w_k, the w_k from the clients' own live models: scalars lose nothing."""
    f = decomfl(tiny_recipe, tmp_path, perturbations=3)
    ends, updates = [], []
    for client in f.clients:
        updates.append(f.train(client, 1))
        ends.append(f.live().double())
    f.server.aggregate(iter(updates))
    weights = [u.num_examples for u in updates]
    mean = sum(w * e for w, e in zip(weights, ends, strict=True)) / sum(weights)
    assert torch.allclose(f.server.deployed().adapter.flat.double(), mean, atol=1e-7)


def test_every_round_has_directions_of_its_own(tiny_recipe, tmp_path):
    f = decomfl(tiny_recipe, tmp_path)
    f.round(1)
    f.round(2)
    used = f.server.history.coefficients(f.server.directions)
    assert len(used) == 8 and {d.round for d in used} == {1, 2}


def test_a_round_moves_less_than_20_kilobytes_each_way(tiny_recipe, tmp_path):
    """Thirty steps of ten directions each are 300 numbers; a third of that is played here."""
    f = decomfl(tiny_recipe, tmp_path, {"train.steps": 10}, perturbations=10)
    for number in (1, 2, 3):
        f.round(number, ["copy"])
    f.evaluate("copy", 3)
    numbers, rest = 4 * 100, 2_000  # bytes of a round's scalars; names and the recipe
    assert 3 * 2 * numbers + rest < 20_000
    assert numbers < max(m.up_bytes for m in f.messages) < numbers + rest
    later = [m for m in f.messages if m.round > 1]
    assert max(m.down_bytes for m in later) < 2 * numbers + rest  # of two rounds: the one before is kept
    assert max(m.down_bytes for m in f.messages) < 20_000  # the first has the seed of the adapter, and the recipe


def test_clients_that_take_fewer_steps_add_nothing_along_the_rest(tiny_recipe, tmp_path):
    server = decomfl(tiny_recipe, tmp_path).server
    short, long = torch.tensor([4.0]), torch.tensor([8.0, 2.0])
    updates = [Update("a", 1, Payload({"scalars": short}), 1), Update("b", 1, Payload({"scalars": long}), 3)]
    server.aggregate(iter(updates))
    assert server.history.rounds[0].tolist() == [7.0, 1.5]


def test_epochs_give_clients_rounds_of_different_lengths(tiny_recipe, tmp_path):
    f = decomfl(tiny_recipe, tmp_path, {"train.steps": None, "train.epochs": 1})
    updates = f.round(1)
    assert len({len(u.payload.tensors["scalars"]) for u in updates}) > 1
    f.round(2)
    assert torch.equal(f.evaluated("copy", 2), f.server.deployed().adapter.flat)


def test_a_client_that_lost_its_past_fails_with_a_sentence_and_recovers_when_everything_is_sent(tiny_recipe, tmp_path):
    f = decomfl(tiny_recipe, tmp_path)
    f.round(1)
    f.round(2)
    for path in (tmp_path / "clients" / "copy").iterdir():
        path.unlink()
    outcome = f.send(f.assignment("train", "copy", 3))
    assert isinstance(outcome, Failure) and outcome.reason == "damaged_state" and "--resume" in outcome.detail
    f._met.clear()
    f.train("copy", 3)


def test_a_history_goes_on_from_any_beginning():
    whole, part = History(), History()
    whole.rounds = [torch.randn(n) for n in (3, 0, 2, 4)]
    for held in range(5):
        part.rounds = [r.clone() for r in whole.rounds[:2]]
        if held > 2:
            with pytest.raises(ValueError, match="missing"):
                part.extend(whole.since(held))
            continue
        part.extend(whole.since(held))
        assert all(torch.equal(a, b) for a, b in zip(part.rounds, whole.rounds, strict=True))
    with pytest.raises(ValueError, match="scalars for rounds"):
        part.extend({**whole.since(0), "counts": torch.tensor([1])})


def test_the_servers_state_comes_back_whole(tiny_recipe, tmp_path):
    f = decomfl(tiny_recipe, tmp_path)
    f.round(1)
    f.round(2, ["copy"])
    other = decomfl(tiny_recipe, tmp_path / "other").server
    other.load_server_state(f.server.server_state())
    assert torch.equal(other.deployed().adapter.flat, f.server.deployed().adapter.flat)
    assert other.held == f.server.held == {"copy": 1, "last": 0, "upper": 0}


@pytest.mark.parametrize(
    "wrong", [{}, {"scalars": torch.full((4,), 1e6)}, {"scalars": torch.zeros(4), "x": torch.zeros(1)}]
)
def test_an_update_that_is_none_is_refused(tiny_recipe, tmp_path, wrong):
    server = decomfl(tiny_recipe, tmp_path).server
    with pytest.raises(ValueError):  # noqa: PT011
        server.accept(Update("a", 1, Payload(wrong), 1))
