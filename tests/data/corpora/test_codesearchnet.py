"""fed-codesearchnet's questions, and questions that are in a test set already."""

from __future__ import annotations

import json
from collections import Counter

from fedloom.common.logs import heard_by
from fedloom.data.corpora.codesearchnet import pair_descriptions
from fedloom.data.corpus import Corpus, Example
from fedloom.data.loading import load_corpus
from fedloom.data.splitters import partition, tabulate_split
from fedloom.recipe.recipe import DataConfig, SplitConfig


def functions(language, count):
    return [
        {"code": f"def f{i}(): return {i}", "docstring": f"Return {i}.", "language": language} for i in range(count)
    ]


def test_half_of_the_answers_are_yes_and_every_no_is_anothers_description():
    both = [row for pair in zip(functions("python", 20), functions("go", 20), strict=True) for row in pair]
    rows = list(pair_descriptions(both))
    assert Counter((row["language"], row["output"]) for row in rows) == {
        (language, answer): 10 for language in ("python", "go") for answer in ("Yes", "No")
    }
    for row in rows:
        described, code = row["input"].removeprefix("Description: Return ").split(".\n\n")
        assert (described == code.rpartition(" ")[2]) == (row["output"] == "Yes")


def test_a_description_that_is_right_after_all_and_rows_without_one_are_left_out():
    same = [{"code": f"code {i}", "docstring": "The same.", "language": "go"} for i in range(4)]
    assert [row["output"] for row in pair_descriptions([*same, {"code": "x", "docstring": "", "language": "go"}])] == [
        "Yes"
    ]


def test_codesearchnet_from_files(tmp_path, monkeypatch):
    folder = tmp_path / "codesearchnet"
    folder.mkdir()
    for name, rows in {"train": functions("go", 12) + functions("ruby", 8), "test": functions("go", 30)[20:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    corpus = load_corpus(DataConfig(corpus="fed-codesearchnet"), seed=1)
    assert corpus.categories() == {"go": 12, "ruby": 8}
    assert {e.choices for e in (*corpus.examples, *corpus.test)} == {("Yes", "No")}
    assert len(corpus.test) == 10
    assert corpus.suite == "multiple-choice"


def test_a_question_of_the_test_set_is_not_trained_on(tmp_path, monkeypatch):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": f"How much is {i} + {i}?", "answer": f"It is\n#### {2 * i}"} for i in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{**rows[3], "question": "  how much IS 3 +\n3?"}, {"question": "How much is 1?", "answer": "#### 1"}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    said = []
    with heard_by(said.append):
        corpus = load_corpus(DataConfig(corpus="fed-gsm8k"), seed=1)
    assert [e.instruction for e in corpus.examples] == [row["question"] for k, row in enumerate(rows) if k != 3]
    assert corpus.dropped == {"question_is_in_the_test_set": 1}
    assert "fed-gsm8k: 1 rows left out (question is in the test set)" in said


def test_test_questions_that_are_trained_on_are_counted():
    corpus = Corpus("made-up", tuple(Example("the same", "", f"{i}", "a") for i in range(10)), "CC0-1.0", "a test")
    table = tabulate_split(corpus, partition(corpus, SplitConfig(splitter="uniform", num_clients=1, test=0.3), 1))
    assert table["test_questions_trained_on"] == 3
