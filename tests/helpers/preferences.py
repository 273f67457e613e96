"""Preference pairs that tests share: made-up rows, and a tokenised corpus of pairs of random tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedloom.data.tokenization import TokenisedCorpus
from tests.helpers import tiny


def write_pairs(path: Path, n: int = 60) -> Path:
    """The rows of `tiny` with a rejected answer each: the right one backwards, and a word more."""
    made = [{**row, "rejected": f"{row['output'][::-1]} no"} for row in tiny.rows(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def random_pairs(count: int = 6, seed: int = 0, *, swapped: bool = False) -> TokenisedCorpus:
    """`count` pairs; prompts of 3 to 12 tokens, answers of 1 to 15. `swapped` exchanges chosen and rejected."""
    draw = np.random.default_rng(seed)
    prompts, *answers = ([draw.integers(3, 259, draw.integers(low, high)) for _ in range(count)]
                         for low, high in ((3, 13), (1, 16), (1, 16)))  # fmt: skip
    chosen, rejected = answers[::-1] if swapped else answers
    whole = [np.concatenate(parts) for parts in zip(prompts, chosen, strict=True)]

    def starts(parts):
        return np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)

    return TokenisedCorpus(
        {
            "ids": np.concatenate(whole).astype(np.int32),
            "starts": starts(whole),
            "prompts": np.asarray([len(p) for p in prompts], dtype=np.int32),
            "lost": np.zeros(count, dtype=np.int64),
            "rejected": np.concatenate(rejected).astype(np.int32),
            "rejected_starts": starts(rejected),
        }
    )
