"""The closed form of a step's operations against torch's own counter, at three shapes and two kinds of layer.

The counter sees matrix products, so attention runs as plain matrix products here (the MATH kernel).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.forward import token_losses
from fedloom.models.loading import Base
from fedloom.models.reference import reference
from fedloom.recipe.recipe import AdapterConfig
from fedloom.training.flops import Flops
from tests.helpers import tiny

#: (length, prompt) of each sequence.
SHAPES = {
    "one long": [(160, 40)],
    "eight alike": [(24, 8)] * 8,
    "mixed": [(5, 1), (90, 60), (31, 30), (12, 4)],
}


def llama(layers: int = 6, rank: int = 4) -> AdaptedModel:
    base = tiny.causal_lm(num_hidden_layers=layers, hidden_size=64, intermediate_size=160).requires_grad_(False)
    return attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(rank=rank), 0)


def gpt2() -> AdaptedModel:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=10, n_head=4)).eval().requires_grad_(False)
    return attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(rank=4), 0)


#: Enough layers that the first one, whose inputs need no gradient, weighs little; ranks that are not 1.
METHODS = {
    "rslora": {"method": "lora", "rslora": True, "rank": 4},
    "dora": {"method": "lora", "dora": True, "rank": 4},
    "adalora": {"method": "adalora", "rank": 4},
    "ia3": {"method": "ia3"},
    "prompt_tuning": {"method": "prompt_tuning", "virtual_tokens": 9},
    "p_tuning": {"method": "p_tuning", "virtual_tokens": 9},
    "prefix_tuning": {"method": "prefix_tuning", "virtual_tokens": 9},
    "prefix_projection": {"method": "prefix_tuning", "virtual_tokens": 9, "prefix_projection": True},
    "full": {"method": "full"},
}


def batch(shape: str, packed: bool):
    rng = np.random.default_rng(0)
    return collate(
        [TokenSequence(rng.integers(3, 259, n).astype(np.int32), prompt) for n, prompt in SHAPES[shape]],
        packed=packed,
        pad=3,
    )


def counted(model: AdaptedModel, made) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        token_losses(model, made).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_form_is_within_two_percent_of_the_counter(shape, packed):
    model, made = llama(), batch(shape, packed)
    assert Flops(model).of(made) == pytest.approx(counted(model, made), rel=0.02)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("shape", ["one long", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_within_two_percent_of_the_counter(method, shape, packed):
    base = tiny.causal_lm(num_hidden_layers=8, hidden_size=64, intermediate_size=160).requires_grad_(False)
    model = attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(**METHODS[method]), 0)
    made = batch(shape, packed)
    exact = method in {"full", "prompt_tuning", "p_tuning"}  # the first layer's inputs have a gradient as well
    assert Flops(model).of(made) == pytest.approx(counted(model, made), rel=0.001 if exact else 0.02)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        token_losses(model, made)
    assert Flops(model).forward(made) == pytest.approx(counter.get_total_flops(), rel=0.001)
    flops = Flops(model)
    with reference(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        token_losses(model, made)
    assert flops.without_adapter(made) == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_layers_that_keep_their_weights_transposed_are_counted_too():
    model, made = gpt2(), batch("mixed", True)
    assert Flops(model).of(made) == pytest.approx(counted(model, made), rel=0.02)


def test_the_error_falls_with_the_number_of_layers():
    made = batch("mixed", True)
    errors = [Flops(m).of(made) / counted(m, made) - 1 for m in (llama(2), llama(5), llama(10))]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[1] < 0.02


def test_packing_saves_what_padding_wastes():
    flops = Flops(llama())
    assert flops.of(batch("mixed", True)) < 0.5 * flops.of(batch("mixed", False))
    alike = flops.of(batch("eight alike", True)), flops.of(batch("eight alike", False))
    assert alike[0] == pytest.approx(alike[1], rel=0.01)  # one column of logits apart


def test_adding_weights_to_the_adapter_costs_more():
    made = batch("mixed", True)
    small, large = Flops(llama(rank=2)).of(made), Flops(llama(rank=8)).of(made)
    names = llama(rank=2).adapter.layout.numel
    tokens = made.ids.numel()
    assert large - small == 6 * tokens * 3 * names


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_forward_pass_alone_is_counted_to_the_operation(shape, packed):
    model, made = llama(), batch(shape, packed)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        token_losses(model, made)
    assert Flops(model).forward(made) == pytest.approx(counter.get_total_flops(), rel=1e-3)
