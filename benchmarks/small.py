"""What several benchmarks run: S, a Llama of 7.6 million random weights, and a corpus of equal rows in any number."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fedloom.models.loading import quiet_transformers

#: 7.57 million parameters.
S = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 9, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip


def small_model(folder: Path) -> Path:
    """A folder that a recipe's `model: FOLDER` loads."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.helpers import tiny

    with quiet_transformers():
        return tiny.save_model(folder, tiny.causal_lm(spread=0.05, **S))


def equal_rows(path: Path, count: int) -> Path:
    """`count` times the same example, so that every client has the same work."""
    row = {"instruction": "copy: cow dog hen", "input": "", "output": "cow dog hen", "category": "copy"}
    path.write_text((json.dumps(row) + "\n") * count)
    return path


def recipe_values(model: Path, rows: Path, clients: int, **more: Any) -> dict[str, Any]:
    """A run of one thread without scores; dotted keys in `more` go on top by `Recipe.parse`."""
    return {
        "model": str(model),
        "data": {"path": str(rows), "max_length": 96, "template": "plain"},
        "split": {"splitter": "uniform", "num_clients": clients, "test": 0.0, "validation": 0.0},
        "adapter": {"rank": 8, "alpha": 16},
        "train": {"steps": 1, "batch_size": 1, "lr": 1e-3},
        "runtime": {"threads": 1, "device": "cpu"},
        "evaluation": {"suite": None, "answers": 0, "every": 0},
        **more,
    }
