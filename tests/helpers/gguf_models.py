"""Tiny models of the architectures that `fedloom export --format gguf` takes, with a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedloom.models.gguf.vocabulary import SPLIT_RULES
from tests.helpers import tiny

ROWS = 430  # of the embedding, a few more than there are tokens
SIZES: dict[str, Any] = {**tiny.SHAPE, "vocab_size": ROWS, "initializer_range": 0.2, "head_dim": 8}
CLASSES: dict[str, Any] = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def model_of(kind: str, **more: Any) -> Any:
    """A random one; norms and biases, which begin as ones and zeros, are moved away from them."""
    values = {**SIZES, **more}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "llama":
            model: Any = tiny.causal_lm(**values)
        else:
            config, cls = CLASSES[kind]
            model = cls(config(**values))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def as_llama_3() -> PreTrainedTokenizerFast:
    """The tokenizer of words with Llama 3's cut, whole pieces before merges, and a bos in front of every text."""
    made = tiny.words_tokenizer()
    declared = json.loads(made.backend_tokenizer.to_str())
    declared["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(declared))
    (cut,) = (steps[0] for steps, (name, _) in SPLIT_RULES.items() if name == "llama-bpe")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def saved(folder: Path, model: Any, tokenizer: Any = None) -> Path:
    """A folder that a recipe's `model: FOLDER` loads."""
    model.save_pretrained(folder)
    (tokenizer or tiny.words_tokenizer()).save_pretrained(folder)
    return folder
