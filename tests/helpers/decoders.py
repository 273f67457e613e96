"""Six-layer random decoders of many architectures, for tests that cut them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers

from fedloom.models.loading import quiet_transformers

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED = {**SMALL, "intermediate_size": 64}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GATED, "num_key_value_heads": 2}),
    "llama-tied": ("LlamaConfig", {**GATED, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**GATED, "num_key_value_heads": 2, **WINDOW}),
    "qwen3": ("Qwen3Config", {**GATED, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**GATED, "num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GATED, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**GATED, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}),
    "mistral": ("MistralConfig", {**GATED, "num_key_value_heads": 2}),
    "phi": ("PhiConfig", GATED),
    "smollm3": ("SmolLM3Config", {**GATED, "num_key_value_heads": 2, "no_rope_layer_interval": 2}),
    "gpt2": ("GPT2Config", SMALL),
    "gpt2-by-index": ("GPT2Config", {**SMALL, "scale_attn_by_inverse_layer_idx": True}),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "bloom": ("BloomConfig", {**SMALL, "n_layer": 6, "n_head": 4}),
    "gpt-neox": ("GPTNeoXConfig", GATED),
    "gpt-neo": ("GPTNeoConfig", {**SMALL, "attention_types": [[["global", "local"], 3]], "window_size": 4}),
}


@cache
def decoder(architecture: str) -> Any:
    """Shared between tests: leave it as it is."""
    name, values = ARCHITECTURES[architecture]
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**values))
    return model.eval().requires_grad_(False)


def some_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(1))
