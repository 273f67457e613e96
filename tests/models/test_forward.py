"""Packed batches against peft's own padded forward: the same losses and the same gradient, or a refusal to pack.

The reference below shares nothing with the package but the weights: it pads on the right, takes all logits and shifts
them itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from fedloom.common.randomness import derive_seed
from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenisedCorpus, TokenSequence
from fedloom.evaluation.loss import loss_sums
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.attention import packed as attention
from fedloom.models.attention.packed import packed_attention
from fedloom.models.forward import batch_by_length, plain_attention, supports_packing, token_losses
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig
from tests.helpers import tiny

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {**SMALL, **TOKENS, "intermediate_size": 64}

#: Architecture → its configuration. A window of 12 is wider than the probe's sequences, one of 4 is not.
ARCHITECTURES = {
    "llama": ("LlamaConfig", {**GATED, "num_key_value_heads": 4}),
    "llama-gqa": ("LlamaConfig", {**GATED, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {**GATED, "num_key_value_heads": 2}),
    "mistral-window-4": ("MistralConfig", {**GATED, "num_key_value_heads": 2, "sliding_window": 4}),
    "mistral-window-12": ("MistralConfig", {**GATED, "num_key_value_heads": 2, "sliding_window": 12}),
    "gpt2": ("GPT2Config", {**SMALL, **TOKENS}),
    "opt": ("OPTConfig", {**SMALL, **TOKENS, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "gpt-neox": ("GPTNeoXConfig", GATED),
    "phi": ("PhiConfig", GATED),
    "gemma": ("GemmaConfig", {**GATED, "num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GATED, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}),
    "bloom": ("BloomConfig", {**SMALL, **TOKENS, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
}
#: These keep a mask or a softcap of their own, or read the mask that packing does without, and have to be padded.
PADDED = {"gemma2", "bloom", "mpt"}

LENGTHS = ((5, 2), (30, 7), (17, 16), (2, 0))


def base_model(architecture: str) -> torch.nn.Module:
    name, values = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager" if architecture in PADDED else "sdpa"
        )
    return model.eval().requires_grad_(False)


def adapted(architecture: str, seed: int = 5) -> AdaptedModel:
    """With an adapter that does something: peft's own start has B = 0, which hides half of the gradient."""
    model = attach(Base(base_model(architecture), tiny.tokenizer(), ""), AdapterConfig(rank=2, alpha=4), seed)
    model.adapter.flat.copy_(weights(model.adapter.layout.numel))
    return model


def weights(numel: int) -> torch.Tensor:
    return 0.1 * torch.randn(numel, generator=torch.Generator().manual_seed(7))


def sequences(lengths: Sequence[tuple[int, int]] = LENGTHS) -> list[TokenSequence]:
    rng = np.random.default_rng(3)
    return [TokenSequence(rng.integers(3, 259, n).astype(np.int32), prompt) for n, prompt in lengths]


def reference(architecture: str, seqs: Sequence[TokenSequence], seed: int = 5) -> tuple[list[float], dict]:
    """Losses in order and gradients by name of plain peft: right padding, all logits, labels shifted by hand."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "init"))
        model = get_peft_model(base_model(architecture), config).eval()
    names = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    parameters = dict(model.named_parameters())
    flat, at = weights(sum(parameters[n].numel() for n in names)), 0
    with torch.no_grad():
        for name in names:  # the flat buffer is in sorted name order
            parameters[name].copy_(flat[at : at + parameters[name].numel()].view_as(parameters[name]))
            at += parameters[name].numel()
    longest = max(len(s) for s in seqs)
    ids = torch.full((len(seqs), longest), 3)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(seqs):
        ids[row, : len(s)] = torch.as_tensor(s.ids.astype(np.int64))
        mask[row, : len(s)] = 1
    log_probabilities = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    losses = [
        -log_probabilities[row, t - 1, ids[row, t]]
        for row, s in enumerate(seqs)
        for t in range(max(1, s.prompt), len(s))
    ]
    torch.stack(losses).mean().backward()
    return torch.stack(losses).tolist(), {n.replace(".default", ""): parameters[n].grad for n in names}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_first_gradient_equal_pefts_padded_forward(architecture):
    model = adapted(architecture)
    packed = supports_packing(model)
    assert packed == (architecture not in PADDED)
    losses = token_losses(model, collate(sequences(), packed=packed, pad=3))
    losses.mean().backward()
    expected, gradients = reference(architecture, sequences())
    assert losses.tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    flat = torch.cat([gradients[n].flatten() for n in model.adapter.layout.names])
    assert float((model.grad - flat).norm()) <= 1e-5 * float(flat.norm())
    assert float(flat.norm()) > 0.01


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - PADDED))
def test_the_padded_path_gives_the_packed_losses(architecture):
    """A model that can pack may be told not to (train.packing=off)."""
    model = adapted(architecture)
    padded = token_losses(model, collate(sequences(), packed=False, pad=3))
    packed = token_losses(model, collate(sequences(), packed=True, pad=3))
    assert torch.allclose(padded, packed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", sorted(PADDED))
def test_a_refused_probe_leaves_the_attention_function_as_it_was(architecture):
    model = adapted(architecture)
    before = model.causal_lm.config._attn_implementation
    assert not supports_packing(model)
    assert model.causal_lm.config._attn_implementation == before == plain_attention(model)


def test_a_model_that_mixes_segments_is_found_out(monkeypatch):
    """The probe itself: attention over the whole row must not pass."""

    def whole_row(*args, segment_lengths=None, **kwargs):
        return packed_attention(*args, segment_lengths=(sum(segment_lengths),), **kwargs)

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._local_mapping, attention.NAME, whole_row)
    assert not supports_packing(adapted("llama"))


def test_packed_neighbours_do_not_change_a_sequences_losses():
    model = adapted("llama-gqa")
    a, b, c, _ = sequences()
    alone = token_losses(model, collate([b], packed=True, pad=3))
    between = token_losses(model, collate([a, b, c], packed=True, pad=3))
    start = a.supervised
    assert torch.allclose(between[start : start + b.supervised], alone, atol=1e-5)


def test_positions_restart_in_every_packed_sequence():
    """Two copies of one sequence have the same losses wherever they lie (rotary and learned positions alike)."""
    for architecture in ("llama", "gpt2", "opt"):
        model = adapted(architecture)
        one = sequences()[1]
        twice = token_losses(model, collate([one, one], packed=True, pad=3))
        first, second = twice.split(one.supervised)
        assert torch.allclose(first, second, atol=1e-5), architecture


@pytest.mark.parametrize("packed", [True, False])
def test_logits_are_made_only_where_there_is_a_label(packed):
    model = adapted("llama")
    seen: list[int] = []
    head = model.causal_lm.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:-1].numel()))
    batch = collate([s for s in sequences() if s.prompt > 6], packed=packed, pad=3)
    token_losses(model, batch)
    hook.remove()
    # packed: one row of logits a label; padded: no column before the first label's (position 6 of 30)
    assert seen == [len(batch.labels) if packed else 2 * (30 - 6)]


def test_gradients_reach_the_base_nowhere():
    model = adapted("llama")
    token_losses(model, collate(sequences(), packed=True, pad=3)).sum().backward()
    assert all(p.grad is None for n, p in model.module.named_parameters() if "lora_" not in n)


def test_packed_attention_refuses_what_it_cannot_do():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="segment_lengths"):
        packed_attention(torch.nn.Identity(), q, q, q, None)
    with pytest.raises(ValueError, match="no softcap"):
        packed_attention(torch.nn.Identity(), q, q, q, None, segment_lengths=(4,), softcap=30.0)
    with pytest.raises(ValueError, match="no mask"):
        packed_attention(torch.nn.Identity(), q, q, q, torch.zeros(1), segment_lengths=(4,))


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_packed_attention_is_softmax_attention_by_hand(window):
    draw = torch.Generator().manual_seed(0)
    lengths, heads, groups, d = (3, 1, 7), 4, 2, 8
    total = sum(lengths)
    q = torch.randn(1, heads, total, d, generator=draw)
    k, v = (torch.randn(1, groups, total, d, generator=draw) for _ in range(2))
    out, _ = packed_attention(
        torch.nn.Identity(), q, k, v, None, scaling=0.3, segment_lengths=lengths, sliding_window=window
    )
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    at = torch.arange(total)
    distance = at[:, None] - at[None, :]
    allowed = (segment[:, None] == segment[None, :]) & (distance >= 0)
    if window:
        allowed &= distance < window
    for head in range(heads):
        scores = (q[0, head] @ k[0, head // 2].T * 0.3).masked_fill(~allowed, float("-inf"))
        assert torch.allclose(out[0, :, head], scores.softmax(-1) @ v[0, head // 2], atol=1e-6)


def test_batch_by_length_hold_every_sequence_once_longest_first():
    seqs = sequences()
    batches = batch_by_length(seqs, 3, packed=False, pad=3, examples=[10, 11, 12, 13])
    assert [b.examples for b in batches] == [(11, 12, 10), (13,)]
    assert [b.lengths for b in batches] == [(30, 17, 5), (2,)]


@pytest.mark.parametrize("packed", [True, False])
def test_held_out_loss_is_the_sum_over_supervised_tokens(packed):
    seqs = sequences()
    lengths = [len(s) for s in seqs]
    corpus = TokenisedCorpus(
        {
            "ids": np.concatenate([s.ids for s in seqs]),
            "starts": np.concatenate([[0], np.cumsum(lengths)]),
            "prompts": np.array([s.prompt for s in seqs], dtype=np.int32),
            "lost": np.zeros(4, dtype=np.int64),
        }
    )
    expected, _ = reference("llama", seqs)
    total, tokens = loss_sums(adapted("llama"), corpus, range(4), batch_size=2, packed=packed)
    assert tokens == len(expected) == 3 + 23 + 1 + 1
    assert total == pytest.approx(sum(expected), rel=1e-5)
