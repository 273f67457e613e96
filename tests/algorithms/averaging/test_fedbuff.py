"""FedBuff's rule: by hand, against FedAvg, and what each staleness counts."""

from __future__ import annotations

import math

import pytest
import torch

import fedloom
from fedloom.algorithms.averaging.fedbuff import FedBuff
from fedloom.federation.rounds.asynchronous import Buffer
from fedloom.messages.at_rest import load_tensors
from tests.helpers import averaging_rounds as rounds
from tests.helpers.federation import Federation


def after(version: int, **options):
    """A server at `version`, its model where it started."""
    algorithm = rounds.server("fedbuff", rounds.drawn(0), **options)
    algorithm.kept.meta["version"] = version
    return algorithm


def moved(algorithm, *updates) -> torch.Tensor:
    before = algorithm.shared.flat.double().clone()
    algorithm.aggregate(iter(updates))
    return algorithm.shared.flat.double() - before


def test_an_update_three_versions_old_moves_the_model_half_as_far_as_a_fresh_one():
    change = rounds.drawn(1)
    fresh = moved(after(7), rounds.update("a", change, 5, round=8))
    old = moved(after(7), rounds.update("a", change, 5, round=5))  # started from version 4
    assert torch.allclose(fresh, rounds.flat(change), atol=1e-7)
    assert torch.allclose(old, fresh / math.sqrt(4), atol=1e-7)


def test_the_step_by_hand_with_known_staleness():
    """θ ← θ + η Σ n_k s(τ_k) Δ_k / Σ n_k: 1, 2 and 5 examples, 0, 1 and 3 versions old; s is not in the denominator."""
    changes = [rounds.drawn(seed) for seed in (1, 2, 3)]
    sent = [
        rounds.update(name, change, examples, round=6 - tau)
        for name, change, examples, tau in zip("abc", changes, (1, 2, 5), (0, 1, 3), strict=True)
    ]
    a, b, c = (rounds.flat(change) for change in changes)
    by_hand = 0.5 * (1 * a + 2 * b / math.sqrt(2) + 5 * c / 2) / 8
    algorithm = after(5, lr=0.5)
    assert torch.allclose(moved(algorithm, *sent), by_hand, atol=1e-7)
    assert algorithm.version == 6
    metrics = after(5).aggregate(iter(sent))
    assert (metrics["staleness"], metrics["oldest"]) == (4 / 3, 3)
    # with the exponent 0 age does not matter, with 1 it is 1 / (1 + τ); tokens weigh ten times as much each, so the same
    assert torch.allclose(moved(after(5, staleness=0), *sent), (a + 2 * b + 5 * c) / 8, atol=1e-7)
    assert torch.allclose(moved(after(5, staleness=1), *sent), (a + b + 5 * c / 4) / 8, atol=1e-7)
    assert torch.allclose(moved(after(5, weight_by="tokens"), *sent), 2 * by_hand, atol=1e-7)


def test_the_version_rises_by_one_with_each_buffer_and_is_part_of_the_servers_state():
    algorithm = after(0)
    for number in (1, 2, 3):
        algorithm.aggregate(iter([rounds.update("a", rounds.drawn(number), round=number)]))
    again = rounds.server("fedbuff")
    again.load_server_state(rounds.saved(algorithm))
    late = rounds.update("b", rounds.drawn(9), round=2)
    assert again.staleness(late) == algorithm.staleness(late) == 2
    assert torch.equal(moved(again, late), moved(algorithm, late))


@pytest.mark.parametrize("round", [-1, 0, 5, 9])
def test_an_update_from_a_version_that_is_not_there_is_refused(round):
    algorithm = after(3)
    for possible in (1, 2, 3, 4):
        algorithm.accept(rounds.update("a", rounds.drawn(1), round=possible))
    with pytest.raises(ValueError, match="expected one from 0 to 3"):
        algorithm.accept(rounds.update("a", rounds.drawn(1), round=round))


def test_a_buffer_may_be_a_number_or_a_share_of_those_in_flight():
    wanted = {(2, 8): 2, (0.5, 8): 4, (0.5, 3): 2, (0.5, 1): 1, (0.01, 8): 1, (3.0, 8): 3, (1.0, 8): 1, (0.99, 8): 8}
    for (buffer, in_flight), expected in wanted.items():
        assert FedBuff.buffer(rounds.made("fedbuff", buffer=buffer), in_flight) == expected


def test_within_a_buffer_the_order_of_arrival_changes_no_bit(tmp_path):
    """Clients fold in their listed order, and a client that is in the buffer twice with its older update first."""
    arrivals = [("a", 1), ("b", 3), ("a", 2), ("c", 3)]
    sent = [rounds.update(c, rounds.drawn(i), i, round=r) for i, (c, r) in enumerate(arrivals, 1)]
    by_hand = moved(after(2), *(sent[i] for i in (3, 1, 0, 2)))
    results = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        algorithm = after(2)
        with Buffer(["c", "b", "a"], tmp_path) as buffer:
            for i in order:
                buffer.add(sent[i])
            folded = list(buffer)
        assert [(u.client, u.round) for u in folded] == [("c", 3), ("b", 3), ("a", 1), ("a", 2)]
        results.append(moved(algorithm, *folded))
    assert all(torch.equal(result, by_hand) for result in results)
    assert not list(tmp_path.iterdir())


def test_what_travels_up_is_the_change_since_the_start(tiny_recipe, tmp_path):
    played = Federation(tiny_recipe({"algorithm": "fedbuff"}), tmp_path)
    first, second, _ = played.clients
    start = played.server.shared.flat.clone()
    update = played.train(first, 1)
    trained = played.live()
    assert torch.equal(rounds.flat(update.payload.tensors).float(), trained - start)
    played.server.aggregate(iter([update]))
    # the second starts from version 1 and comes back when there is version 2: only its own change counts
    late = played.train(second, 2)
    own = played.live() - played.server.shared.flat
    played.server.aggregate(iter([played.train(first, 2)]))
    before = played.server.shared.flat.clone()
    played.server.aggregate(iter([late]))
    assert torch.allclose(played.server.shared.flat - before, own / math.sqrt(2), atol=1e-7)


# ------------------------------------------------------------------ against FedAvg, whole runs


def adapter(folder) -> torch.Tensor:
    return rounds.flat(load_tensors(folder / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize(("number", "optimizer", "tolerance"), [(1, "adamw", 1e-7), (3, "sgd", 1e-6)])
def test_a_buffer_of_all_clients_is_fedavg(number, optimizer, tolerance, tiny_recipe, tmp_path):
    """To rounding: a difference of two fp32 numbers is rounded once. AdamW amplifies that from round to round."""
    values = {"federation.rounds": number, "train.optimizer": optimizer, "runtime.speed_spread": 2.0}
    lr = {"adamw": 1e-2, "sgd": 1.0}[optimizer]
    ours = fedloom.run(
        tiny_recipe({**values, "algorithm": {"name": "fedbuff", "buffer": 3}, "train.lr": lr}), tmp_path / "a"
    )
    theirs = fedloom.run(tiny_recipe({**values, "algorithm": "fedavg", "train.lr": lr}), tmp_path / "b")
    gap = (adapter(ours.folder) - adapter(theirs.folder)).abs().max()
    assert gap <= tolerance
    assert theirs.summary["loss"]["after"] < theirs.summary["loss"]["before"] - 0.01
    assert ours.summary["loss"]["after"] == pytest.approx(theirs.summary["loss"]["after"], abs=1e-5)


def test_rounding_is_all_that_differs_from_fedavg():
    """On made-up numbers, far from each other in size: each within one unit in the last place of the larger of θ, Δ."""
    start = rounds.drawn(0, 0.1)
    theirs, ours = rounds.server("fedavg", start), rounds.server("fedbuff", start)
    trained = [{n: t + c for (n, t), c in zip(start.items(), rounds.drawn(s).values(), strict=True)} for s in (1, 2, 3)]
    theirs.aggregate(iter([rounds.update("k", t, n) for n, t in enumerate(trained, 1)]))
    ours.aggregate(
        iter([rounds.update("k", {m: t[m] - start[m] for m in t}, n) for n, t in enumerate(trained, 1)])
    )  # fmt: skip
    unit = 2.0**-23 * max(float(rounds.flat(t).abs().max()) for t in trained)
    assert (theirs.shared.flat - ours.shared.flat).abs().max() <= unit


@pytest.mark.parametrize("buffer", [0, 0.0, -1, 1.5, 2.25])
def test_a_buffer_is_a_number_or_a_fraction(buffer):
    with pytest.raises(ValueError, match="buffer"):
        rounds.made("fedbuff", buffer=buffer)
