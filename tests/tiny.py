"""Tiny made-up things that the tests share: a byte-level tokenizer, a random model of a few thousand weights, rows.

Everything is made from seeds here, so that no test needs a download and none depends on what a registry has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.models.random_model import VOCABULARY, tokenizer

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


WORDS = ("ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen", "owl", "pig", "rat", "yak")


def rows(n: int, categories: Sequence[str] = ("copy", "last", "upper"), seed: int = 0) -> list[dict[str, str]]:
    """Short instructions; category i has i + 1 parts of the rows, so that clients differ in size."""
    draw = random.Random(seed)
    parts = [c for i, c in enumerate(categories) for _ in range(i + 1)]
    made = []
    for number in range(n):
        category = parts[number % len(parts)]
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 4))]
        answer = {0: " ".join(words), 1: words[-1], 2: " ".join(words).upper()}[categories.index(category) % 3]
        given = " ".join(words) if number % 2 else ""
        asked = f"{category}:" if given else f"{category}: {' '.join(words)}"
        made.append({"instruction": asked, "input": given, "output": answer, "category": category})
    return made


def write_rows(path: Path, n: int = 60, categories: Sequence[str] = ("copy", "last", "upper"), seed: int = 0) -> Path:
    """`rows` as a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(n, categories, seed)), encoding="utf-8")
    return path
