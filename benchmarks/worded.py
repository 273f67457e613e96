"""Examples of unequal lengths, made of words: what benchmarks of training learn. Imported by the other scripts."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ("ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen", "owl", "pig", "rat", "yak")


def worded_rows(path: Path, count: int, words: tuple[int, int], seed: int = 0) -> Path:
    """`count` examples that copy some words, at least the first and at most the second number of `words`."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(*words)))
        rows.append({"instruction": "copy: " + text, "input": "", "output": text, "category": "copy"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
