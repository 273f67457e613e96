"""RoLoRA: B in odd rounds, A in even ones; the other factor is frozen bit for bit."""

from __future__ import annotations

import pytest
import torch

from fedloom.messages.at_rest import from_bytes, to_bytes
from tests.helpers.lora_rounds import client, drawn, gap_after, models, server, trained


@pytest.mark.parametrize("round", [1, 2, 3])
def test_the_other_factor_is_unchanged_bit_for_bit(round):
    of = models()
    central, algorithm = server("rolora", of=of), client("rolora", of)
    for _ in range(round - 1):
        central.aggregate(iter(drawn(central)))
    start = central.shared.snapshot().views
    sent = trained(algorithm, central.round_payload("a"), "a", round, weight_decay=0.1)
    for p in algorithm.pairs:
        moving, still = (p.b, p.a) if round % 2 else (p.a, p.b)
        assert torch.equal(algorithm.model.adapter.views[still], start[still])
        assert not torch.equal(sent.tensors[moving], start[moving])
        assert still not in sent.tensors
    central.accept(type(drawn(central)[0])("a", round, sent, num_examples=1))


def test_every_round_is_exact():
    algorithm = server("rolora")
    for seed in range(4):
        assert gap_after(algorithm, drawn(algorithm, seed)) <= 1e-6


def test_the_server_knows_whose_turn_it_is_after_a_restart():
    algorithm, again = server("rolora"), server("rolora")
    algorithm.aggregate(iter(drawn(algorithm)))
    again.load_server_state(from_bytes(to_bytes(algorithm.server_state())))
    assert again.update_layout() == algorithm.update_layout()
    assert all("lora_A" in n for n in again.update_layout().names)
