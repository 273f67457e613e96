"""Preference data in the shapes that people have it in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedloom.common.logs import heard_by
from fedloom.data.loading import for_objective, load_corpus
from fedloom.recipe.recipe import DataConfig

ASKED = {"role": "user", "content": "How many?"}
TWO, THREE = {"role": "assistant", "content": "Two."}, {"role": "assistant", "content": "Three."}

SHAPES = {
    "text": {"prompt": "How many?", "chosen": "Two.", "rejected": "Three."},
    "instruction": {"instruction": "How many?", "output": "Two.", "rejected": "Three."},
    "messages": {"prompt": [ASKED], "chosen": [TWO], "rejected": [THREE]},
    "implicit prompt": {"chosen": [ASKED, TWO], "rejected": [ASKED, THREE]},
    "one turn each": {
        "conversations": [{"from": "human", "value": "How many?"}],
        "chosen": {"from": "gpt", "value": "Two."},
        "rejected": {"from": "gpt", "value": "Three."},
    },
}


def read(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_corpus(DataConfig(path=str(path)), seed=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pair_is_read_from_every_usual_shape(shape, tmp_path):
    (example,) = read(tmp_path / "pairs.jsonl", [SHAPES[shape]]).examples
    assert (example.instruction, example.output, example.rejected) == ("How many?", "Two.", "Three.")


def test_earlier_turns_stand_before_the_answer_each_with_its_name(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, ASKED, TWO, {"role": "user", "content": "Sure?"}]
    row = {"prompt": turns, "chosen": "Yes.", "rejected": "No."}
    (example,) = read(tmp_path / "pairs.jsonl", [row]).examples
    assert example.instruction == "Be brief.\n\nUser: How many?\n\nAssistant: Two.\n\nUser: Sure?"


def test_rows_without_a_rejected_answer_are_left_out_and_counted(tmp_path):
    said: list[str] = []
    rows = [SHAPES["text"], {**SHAPES["text"], "rejected": " "}, {**SHAPES["text"], "rejected": None}]
    with heard_by(said.append):
        corpus = for_objective(read(tmp_path / "pairs.jsonl", rows), "dpo")
    assert len(corpus.examples) == 1
    assert corpus.dropped == {"empty_rejected_answer": 2}
    assert any("2 rows left out" in line for line in said)


def test_a_rejected_answer_is_part_of_what_a_corpus_is(tmp_path):
    other = {**SHAPES["text"], "rejected": "Four."}
    assert read(tmp_path / "a.jsonl", [SHAPES["text"]]).digest() != read(tmp_path / "a.jsonl", [other]).digest()


def test_generated_pairs_have_a_wrong_answer_of_the_same_skill():
    pytest.importorskip("reasoning_gym")
    corpus = load_corpus(DataConfig(corpus="fed-preferences"), seed=3)
    answers: dict[str, set[str]] = {}
    for e in corpus.examples:
        answers.setdefault(e.category, set()).add(e.output)
    assert len(corpus.examples) == 2896
    assert all(e.rejected != e.output and e.rejected in answers[e.category] for e in corpus.examples)
    again = load_corpus(DataConfig(corpus="fed-preferences"), seed=3)
    assert again.digest() == corpus.digest()


@pytest.mark.skipif("FEDLOOM_DATA" not in os.environ, reason="FEDLOOM_DATA is not set")
def test_a_public_file_of_conversations():
    path = Path(os.environ["FEDLOOM_DATA"]) / "preference"
    corpus = load_corpus(DataConfig(path=str(path)), seed=0)
    assert len(corpus.examples) == 300
    assert all(e.instruction and e.output and e.rejected for e in corpus.examples)
