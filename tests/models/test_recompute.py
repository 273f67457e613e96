"""Training in less memory: the same losses and gradients, fewer bytes kept for backward, refused where neither holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import fedloom
from fedloom.algorithms.base import Algorithm
from fedloom.common.errors import UserError
from fedloom.common.randomness import fork_torch
from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.forward import supports_chunks, token_losses
from fedloom.models.loading import Base
from fedloom.models.recompute import recompute_obstacle, save_memory
from fedloom.recipe.recipe import AdapterConfig
from tests.helpers import tiny

DRAW = np.random.default_rng(0)
SEQUENCES = [TokenSequence(DRAW.integers(3, 259, n).astype(np.int32), 2) for n in (30, 17, 25, 9)]


def adapted(method: str, **shape) -> AdaptedModel:
    base = tiny.causal_lm(**shape).requires_grad_(False)
    return attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(**tiny.METHODS[method]), 0)


def trained(
    model: AdaptedModel, packed: bool, recompute: bool, chunk: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(losses, gradient, bytes that the forward pass left for backward, weights not counted)."""
    batch = collate(SEQUENCES, packed=packed, pad=0)
    weights = {p.data_ptr() for p in model.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.grad.zero_()
    model.module.train()
    with fork_torch(0, "dropout"), save_memory(model, recompute, chunk):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            losses = token_losses(model, batch)
            total = losses.mean()
        total.backward()
    model.module.eval()
    return losses.detach(), model.grad.clone(), sum(kept.values())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("method", tiny.METHODS)
def test_losses_and_gradients_are_those_of_plain_training(method, packed):
    model = adapted(method)
    losses, gradient, _ = trained(model, packed, False, None)
    assert float(gradient.norm()) > 0
    for recompute, chunk in ((True, None), (False, 7), (True, 7)):
        if recompute and recompute_obstacle(model, packed):
            assert (method, packed) == ("prefix", False)
            continue
        other, same, _ = trained(model, packed, recompute, chunk)
        torch.testing.assert_close(other, losses, rtol=0, atol=1e-5)
        assert float((same - gradient).norm() / gradient.norm()) < 1e-5
        if chunk is None:  # the same operations again
            assert torch.equal(other, losses)
            assert torch.equal(same, gradient)


def test_layers_that_are_computed_again_keep_little():
    model = adapted("lora", num_hidden_layers=8)
    plain, less = (trained(model, True, recompute, None)[2] for recompute in (False, True))
    assert less < 0.25 * plain  # 0.06 of the layers', and the logits of both


def test_logits_in_chunks_are_never_all_there():
    model = adapted("lora", vocab_size=20_000)
    plain, less = (trained(model, True, False, chunk)[2] for chunk in (None, 16))
    assert less < 0.25 * plain


@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "scaffold", "ditto"])
def test_a_run_has_the_same_result(tiny_recipe, tmp_path, algorithm):
    both = {"train.checkpointing": True, "train.loss_chunk": 9}
    more = {"algorithm": algorithm, "train.eps": 1e-4, "adapter.dropout": 0.1}
    plain, spared = (fedloom.run(tiny_recipe({**more, **b}), out=tmp_path / f"{len(b)}").summary for b in ({}, both))
    assert spared["loss"]["after"] == pytest.approx(plain["loss"]["after"], abs=1e-5)
    assert spared["cost"]["train_tokens"] == plain["cost"]["train_tokens"]


def test_checkpointing_alone_gives_the_same_bits_and_is_off_outside_of_steps(tiny_recipe, tmp_path, monkeypatch):
    seen = []
    before_step = Algorithm.before_step
    monkeypatch.setattr(
        Algorithm,
        "before_step",
        lambda self, m: seen.append(m.causal_lm.is_gradient_checkpointing) or before_step(self, m),
    )
    plain, spared = (
        fedloom.run(tiny_recipe({"train.checkpointing": on, "adapter.dropout": 0.1}), out=tmp_path / str(on))
        for on in (False, True)
    )
    assert plain.summary["adapter_sha256"] == spared.summary["adapter_sha256"]
    assert not any(seen)


def test_what_would_be_another_result_is_refused(tiny_recipe, tmp_path):
    prefix = {"adapter": {"method": "prefix_tuning", "virtual_tokens": 2}, "train.packing": "off"}
    with pytest.raises(
        UserError, match=r"train\.checkpointing=true cannot be used: a prefix in padded batches is a cache"
    ):
        fedloom.run(tiny_recipe({**prefix, "train.checkpointing": True}), out=tmp_path / "run")
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0, initializer_range=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).requires_grad_(False)
    capped = attach(Base(model, tiny.tokenizer(), ""), AdapterConfig(rank=2), 0)
    assert not supports_chunks(capped)  # its logits are capped after the head
    assert supports_chunks(adapted("lora"))
