"""FFA-LoRA: exact, half the traffic, and an A that nothing moves."""

from __future__ import annotations

import pytest
import torch

from fedloom.messages.types import Payload
from tests.helpers.lora_rounds import client, drawn, gap_after, models, server, trained


def size(payload: Payload) -> int:
    return sum(t.numel() for t in payload.tensors.values())


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fedsvd", "flora", "fedex_lora"])
def test_exact_from_the_factors(name):
    """‖result − Σ p_k ΔW_k‖ / ‖Σ p_k ΔW_k‖ with weights 1:3:4, in fp32; the control `fedit` leaves 1e-3 and more."""
    algorithm, control = server(name), server("fedit")
    assert gap_after(algorithm, drawn(algorithm)) <= 1e-6
    assert gap_after(control, drawn(control)) >= 1e-3


def test_a_stays_as_it_was_initialised_bit_for_bit():
    of = models()
    algorithm, central = client("ffa_lora", of), server("ffa_lora", of=of)
    initial = of.adapted().initial_adapter().views
    sent = trained(algorithm, central.round_payload("a"), weight_decay=0.1)
    for p in algorithm.pairs:
        assert torch.equal(algorithm.model.adapter.views[p.a], initial[p.a])
        assert torch.equal(sent.tensors[p.b], algorithm.model.adapter.views[p.b]) and sent.tensors[p.b].any()
    assert sent.tensors.keys() == {p.b for p in algorithm.pairs}
    central.aggregate(iter(drawn(central)))
    assert all(torch.equal(central.shared.views[p.a], initial[p.a]) for p in central.pairs)


def test_only_b_travels():
    """With as many inputs as outputs traffic halves; here it is B's share of the adapter."""
    of = models(target_modules=["q_proj", "o_proj"])
    algorithm, whole = server("ffa_lora", of=of), server("fedit", of=of)
    assert 2 * size(algorithm.round_payload("a")) == size(whole.round_payload("a"))
    assert 2 * size(drawn(algorithm)[0].payload) == size(drawn(whole)[0].payload)
    assert all("lora_B" in n for n in algorithm.round_payload("a").tensors)


@pytest.mark.parametrize("name", ["ffa_lora", "fedsvd", "rolora"])
def test_clipping_counts_the_gradient_of_b_alone(name):
    """One step of SGD at rate 1 moves B by the clip, whatever A's gradient would have been."""
    of = models()
    central, algorithm = server(name, of=of), client(name, of)
    central.aggregate(iter(drawn(central, size=1.0)))  # B ≠ 0, so A has a gradient
    round = 3 if name == "rolora" else 1
    start = central.shared.snapshot().views
    trained(algorithm, central.round_payload("a"), "a", round, optimizer="sgd", lr=1.0, steps=1, clip=1e-2)
    moved = [algorithm.model.adapter.views[p.b] - start[p.b] for p in algorithm.pairs]
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(1e-2, rel=1e-3)
