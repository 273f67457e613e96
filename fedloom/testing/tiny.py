"""Tiny rows and a tiny recipe, made from seeds, so that a check needs no download and takes seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from fedloom.models import random_model
from fedloom.recipe.recipe import Recipe

WORDS = ("ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen", "owl", "pig", "rat", "yak")


def rows(n: int, categories: Sequence[str] = ("copy", "last", "upper"), seed: int = 0) -> list[dict[str, str]]:
    """Make `n` short instructions; category i has i + 1 parts of the rows, so that clients differ in size."""
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
    """Write `rows` as a jsonl file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(n, categories, seed)), encoding="utf-8")
    return path


def recipe(folder: Path, values: Mapping[str, Any]) -> Recipe:
    """A recipe over a random model and rows in `folder`: three clients of 8, 15 and 22 examples, three rounds of two steps.

    Args:
        values: dotted keys of the recipe that differ.
    """
    with redirect_stderr(StringIO()):  # a progress bar
        model = random_model.build_model(folder / "model")
    plain: dict[str, Any] = {
        "name": "check",
        "model": str(model),
        "data": {"path": str(write_rows(folder / "rows.jsonl")), "max_length": 96, "template": "plain"},
        "split": {"splitter": "meta", "test": 0.2, "validation": 0.05},
        "adapter": {"rank": 2, "alpha": 4},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-2},
        "federation": {"rounds": 3},
        "runtime": {"threads": 1, "device": "cpu"},
        "evaluation": {"suite": None, "answers": 0, "every": 0},
    }
    return Recipe.parse(plain, values)
