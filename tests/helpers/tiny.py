"""Tiny made-up things that the tests share: a byte-level tokenizer, a random model of a few thousand weights, rows.

Everything is made from seeds here, so that no test needs a download and none depends on what a registry has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedloom.models.random_model import VOCABULARY
from fedloom.models.random_model import build_tokenizer as tokenizer
from fedloom.testing.tiny import WORDS, rows, write_rows

__all__ = ["METHODS", "SHAPE", "WORDS", "causal_lm", "rows", "save_model", "words_tokenizer", "write_rows"]

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def causal_lm(seed: int = 0, spread: float = 0.2, **shape: Any) -> LlamaForCausalLM:
    """A random Llama. `spread` is the standard deviation of its weights: wide enough that outputs differ by much."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "initializer_range": spread, **shape}))
    return model.eval()


def save_model(folder: Path, model: Any = None, chat_template: str | None = None) -> Path:
    """A folder that a recipe's `model: FOLDER` loads."""
    (causal_lm() if model is None else model).save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder


def words_tokenizer(*digits: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as GPT-2's: bytes, and merges learned from `rows` and a line of code.

    Args:
        digits: `digits` cuts numbers into single digits first, as SmolLM2's tokenizer does.
    """
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, words]) if steps else words
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{row['instruction']} {row['input']} {row['output']}" for row in rows(200)]
    backend.train_from_iterator([*texts, "def f(x):\n    return x + 123  # 12 and 3\n" * 20], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    made.chat_template = chat_template
    return made


#: A small adapter section of each PEFT method.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2, "dropout": 0.3},
    "dora": {"method": "lora", "rank": 2, "dora": True},
    "adalora": {"method": "adalora", "rank": 2},
    "ia3": {"method": "ia3"},
    "prompt": {"method": "prompt_tuning", "virtual_tokens": 3},
    "p_tuning": {"method": "p_tuning", "virtual_tokens": 3},
    "prefix": {"method": "prefix_tuning", "virtual_tokens": 3},
    "full": {"method": "full"},
}
