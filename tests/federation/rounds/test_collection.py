"""The order in which updates arrive changes nothing: they are folded in client order, and early ones wait on disk."""

from __future__ import annotations

import random

import pytest
import torch

from fedloom import run
from fedloom.common import registry
from fedloom.federation.rounds.synchronous import ClientOrder
from fedloom.messages.types import Failure, Payload, Update
from fedloom.runtimes.simulator import Simulator

CLIENTS = tuple(f"client-{k}" for k in range(7))
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64)


def outcome(number: int):
    client = CLIENTS[number]
    if number == 3:
        return Failure(client, 1, "test", "of its own accord")
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(5, 4, generator=generator).to(DTYPES[number % 4])
    return Update(client, 1, Payload({"w": values, "empty": torch.zeros(0)}, {"n": number}), num_examples=number + 1)


def in_order(outcomes, order, folder):
    """Outcomes in client order, each handed on as soon as it is its turn."""
    with ClientOrder(order, folder) as line:
        for arrived in outcomes:
            line.add(arrived)
            while (ready := line.next()) is not None:
                yield ready
        while (ready := line.next(over=True)) is not None:
            yield ready


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_arrival_comes_out_in_client_order(tmp_path, seed):
    numbers = list(range(7))
    random.Random(seed).shuffle(numbers)
    held = []

    def arriving():
        for number in numbers:
            held.append(len(list(tmp_path.rglob("*"))))
            yield outcome(number)

    got = list(in_order(arriving(), CLIENTS, tmp_path))
    assert [o.client for o in got] == list(CLIENTS)
    for number, result in enumerate(got):
        expected = outcome(number)
        if isinstance(expected, Failure):
            assert result == expected
            continue
        assert isinstance(result, Update)
        assert (result.num_examples, result.payload.meta) == (number + 1, {"n": number})
        for name, tensor in expected.payload.tensors.items():
            assert result.payload.tensors[name].dtype == tensor.dtype
            assert torch.equal(result.payload.tensors[name], tensor)
    assert list(tmp_path.iterdir()) == []
    if numbers != sorted(numbers):
        assert max(held) > 1  # early ones really lay on disk


def test_updates_in_order_are_handed_on_at_once_and_never_touch_the_disk(tmp_path):
    stream = in_order(iter([outcome(0), outcome(1)]), CLIENTS[:2], tmp_path)
    first = next(stream)
    assert first.client == CLIENTS[0]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []
    assert [o.client for o in stream] == [CLIENTS[1]]


def test_a_client_that_never_answers_holds_nobody_back_for_ever(tmp_path):
    arrived = [outcome(n) for n in (4, 2, 0, 6, 5)]
    assert [o.client for o in in_order(iter(arrived), CLIENTS, tmp_path)] == [CLIENTS[n] for n in (0, 2, 4, 5, 6)]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_the_reader_stops_or_the_sender_breaks(tmp_path):
    stream = in_order(iter([outcome(1), outcome(0), outcome(2)]), CLIENTS[:3], tmp_path)
    next(stream)
    stream.close()
    assert list(tmp_path.iterdir()) == []

    def broken():
        yield outcome(1)
        raise RuntimeError("connection lost")

    with pytest.raises(RuntimeError, match="connection lost"):
        list(in_order(broken(), CLIENTS[:2], tmp_path))
    assert list(tmp_path.iterdir()) == []


class Shuffled(Simulator):
    """A runtime whose clients answer in random order."""

    seed = 0

    def run(self, assignments):
        outcomes = list(super().run(assignments))
        random.Random(Shuffled.seed + len(outcomes)).shuffle(outcomes)
        Shuffled.seed += 1
        yield from outcomes


def test_a_runtime_that_answers_in_random_order_gives_the_same_adapter(tiny_recipe, tmp_path):
    registry.runtimes.register("shuffled", Shuffled)
    wanted = {"split.splitter": "uniform", "split.num_clients": 7, "federation.rounds": 3, "train.steps": 1}
    straight = run(tiny_recipe(wanted), tmp_path / "straight").summary
    for number in range(3):
        Shuffled.seed = 100 * number
        recipe = tiny_recipe({**wanted, "runtime.name": "shuffled"})
        shuffled = run(recipe, tmp_path / f"shuffled-{number}").summary
        assert shuffled["adapter_sha256"] == straight["adapter_sha256"]
        assert shuffled["loss"] == straight["loss"]
