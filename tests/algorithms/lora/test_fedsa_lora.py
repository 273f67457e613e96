"""FedSA-LoRA: A is common, B is nobody else's business."""

from __future__ import annotations

import torch

from tests.helpers.lora_rounds import client, drawn, models, server, trained


def test_b_is_in_no_payload_either_way():
    of = models()
    central, algorithm = server("fedsa_lora", of=of), client("fedsa_lora", of)
    for round in (1, 2):
        down = central.round_payload("a")
        up = trained(algorithm, down, "a", round)
        for payload in (down, up, central.initial_payload("b")):
            assert payload.tensors and all("lora_A" in n for n in payload.tensors)
        central.aggregate(iter([type(drawn(central)[0])("a", round, up, num_examples=3)]))
    state = central.server_state().tensors
    for value in (algorithm.model.adapter.views[p.b] for p in algorithm.pairs):
        assert value.any()
        assert not any(torch.equal(value, t) for t in state.values())
    assert not any(t.any() for n, t in state.items() if "lora_B" in n)


def test_every_client_finds_its_own_b_again():
    of = models()
    central, algorithm = server("fedsa_lora", of=of), client("fedsa_lora", of)
    after = {}
    for name in "ab":
        trained(algorithm, central.round_payload(name), name, lr=1e-2 if name == "a" else 2e-2)
        after[name] = {p.b: algorithm.model.adapter.views[p.b].clone() for p in algorithm.pairs}
    central.aggregate(iter(drawn(central)))
    for name in "abc":
        algorithm.begin(name, 1, algorithm.states_of_the_test.get(name))
        algorithm.receive(central.round_payload(name))
        for p in algorithm.pairs:
            expected = after[name][p.b] if name in after else torch.zeros_like(after["a"][p.b])
            assert torch.equal(algorithm.model.adapter.views[p.b], expected)
            assert torch.equal(algorithm.model.adapter.views[p.a], central.shared.views[p.a])


def test_what_is_kept_is_a_copy():
    of = models()
    algorithm = client("fedsa_lora", of)
    trained(algorithm, server("fedsa_lora", of=of).round_payload("a"))
    kept = {n: t.clone() for n, t in algorithm.client_state().tensors.items()}
    of.adapted().adapter.flat.zero_()
    assert all(torch.equal(t, algorithm.client_state().tensors[n]) for n, t in kept.items())
