"""FedRot-LoRA: the same update in other bases averages to that update."""

from __future__ import annotations

import torch

from fedloom.algorithms.lora.fedrot_lora import aligned
from fedloom.messages.types import Payload, Update
from fedloom.models.lowrank import relative_gap
from tests.helpers.lora_rounds import client, drawn, learned, models, result, server


def rotation(seed, size=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))[0]


def rotated(algorithm, tensors, seed):
    turned = dict(tensors)
    for p in algorithm.pairs:
        q = rotation(seed)
        turned[p.b], turned[p.a] = (tensors[p.b].double() @ q).float(), (q.T @ tensors[p.a].double()).float()
    return turned


def copies(first_round: bool):
    """(server, the update that all clients hold, what three clients send who hold it in bases of their own)."""
    of = models()
    central, algorithm = server("fedrot_lora", of=of), client("fedrot_lora", of)
    if not first_round:
        central.aggregate(iter(drawn(central, 5)))
    one = drawn(central)[0].payload.tensors
    sent = []
    for number, name in enumerate("abc"):
        algorithm.begin(name, 1, None)
        algorithm.receive(central.round_payload(name))
        algorithm.model.adapter.load(rotated(algorithm, one, number))
        sent.append(Update(name, 1, algorithm.shared_state(), num_examples=1 + number))
    return central, one, sent


def test_rotated_copies_of_one_client_average_to_that_client():
    for first_round in (True, False):  # B° = 0 has no say in the first
        central, one, sent = copies(first_round)
        exact = learned(central, [Update("a", 1, Payload(one), num_examples=1)])
        central.aggregate(iter(sent))
        assert relative_gap(result(central), exact) <= 1e-5


def test_without_alignment_they_do_not():
    central, one, _ = copies(False)
    exact = learned(central, [Update("a", 1, Payload(one), num_examples=1)])
    central.aggregate(Update(n, 1, Payload(rotated(central, one, i)), num_examples=1) for i, n in enumerate("abc"))
    assert relative_gap(result(central), exact) >= 1e-1


def test_alignment_changes_no_product_and_finds_the_way_back():
    draw = torch.Generator().manual_seed(0)
    b, a = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((9, 3), (3, 7)))
    q = rotation(1)
    b_back, a_back = aligned(b @ q, q.T @ a, b, a)
    assert torch.allclose(b_back, b, atol=1e-12) and torch.allclose(a_back, a, atol=1e-12)
    other = aligned(b @ q, q.T @ a, torch.zeros_like(b), a.flip(0))
    assert torch.allclose(other[0] @ other[1], b @ a, atol=1e-12)
