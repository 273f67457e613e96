"""Rows → examples: which are kept where there are too many, groups, leaks, pairs, columns and cells."""

from __future__ import annotations

from collections import Counter

import pytest

from fedloom.common.errors import UserError
from fedloom.data.corpus import Example
from fedloom.data.examples import as_text, group, limited, paired, question_of, read_examples, without_leaks
from fedloom.data.source import Grouping, Source
from fedloom.recipe.recipe import DataConfig


def of(sizes: dict[str, int]) -> list[Example]:
    """So many examples of each category, the categories taking turns."""
    names = [(at, category) for category, size in sizes.items() for at in range(size)]
    return [Example(f"{category}{at}", "", "x", category) for at, category in sorted(names, key=lambda pair: pair[0])]


def counts(examples: list[Example], limit: int, seed: int = 0) -> dict[str, int]:
    return dict(Counter(e.category for e in limited(examples, limit, seed)))


# ------------------------------------------------------------------ limited


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        # 10, 20 and 30 of 60 in proportion
        ({"a": 10, "b": 20, "c": 30}, 12, {"a": 2, "b": 4, "c": 6}),
        # 1.67, 3.33 and 5: the one that is missing goes to the largest fraction
        ({"a": 10, "b": 20, "c": 30}, 10, {"a": 2, "b": 3, "c": 5}),
        # 0.5, 0.5 and 9: both halves are raised to the floor of one, nothing is missing nor too much
        ({"a": 1, "b": 1, "c": 18}, 10, {"a": 1, "b": 1, "c": 8}),
        # 0.05 five times and 4.75: the floors give out 5 + 4, and the largest gives back as much as needed
        ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "z": 95}, 6, {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "z": 1}),
        # 0.1 three times, 2.85 twice: the floors give out 7 of 6; of two that are equally large the later name gives back
        ({"a": 1, "b": 1, "c": 1, "y": 28, "z": 28}, 6, {"a": 1, "b": 1, "c": 1, "y": 2, "z": 1}),
        # as many as categories: one of each
        ({"a": 1, "b": 5, "c": 94}, 3, {"a": 1, "b": 1, "c": 1}),
        # fewer than categories: there is no floor, the largest fractions have them
        ({"a": 1, "b": 5, "c": 94}, 2, {"c": 2}),
        ({"a": 4, "b": 5, "c": 6}, 2, {"b": 1, "c": 1}),
        # equal fractions: in the order of names
        ({"b": 5, "a": 5, "c": 5}, 4, {"a": 2, "b": 1, "c": 1}),
        ({"a": 3, "b": 3}, 0, {}),
    ],
    ids=str,
)
def test_categories_are_kept_in_proportion_and_each_keeps_one(sizes, limit, expected):
    assert counts(of(sizes), limit) == expected


@pytest.mark.parametrize("limit", range(1, 41))
def test_there_are_never_more_nor_fewer_than_the_limit(limit):
    examples = of({"a": 1, "b": 2, "c": 3, "d": 5, "e": 30})
    kept = counts(examples, limit)
    assert sum(kept.values()) == limit
    if limit >= 5:
        assert set(kept) == set("abcde")
    for category, size in Counter(e.category for e in examples).items():
        assert kept.get(category, 0) <= size


def test_what_is_kept_is_drawn_with_the_seed_and_stays_in_order():
    examples = of({"a": 10, "b": 30})
    kept = limited(examples, 12, 7)
    assert kept == [e for e in examples if e in kept] == limited(examples, 12, 7)
    others = [limited(examples, 12, seed) for seed in range(8, 12)]
    assert all(other != kept for other in others)
    assert len({e.instruction for k in (kept, *others) for e in k}) > 20  # no end of the file is preferred


@pytest.mark.parametrize("limit", [5, 6, 100])
def test_a_limit_that_is_not_reached_keeps_all(limit):
    examples = of({"a": 2, "b": 3})
    kept = limited(examples, limit, 0)
    assert kept == examples and kept is not examples


# ------------------------------------------------------------------ groups, leaks, pairs


def test_small_categories_are_merged_and_meaningless_ones_left_out():
    examples = of({"big": 4, "just": 3, "small": 2, "one": 1, "none": 5})
    kept, dropped = group(examples, Grouping(fewest=3, merged="other", drop=("none", "absent")))
    assert Counter(e.category for e in kept) == {"big": 4, "just": 3, "other": 3}
    assert dropped == {"category_none": 5}
    assert [e.instruction for e in kept] == [e.instruction for e in examples if e.category != "none"]


def test_questions_of_the_test_set_are_left_out_whatever_their_case_and_spaces():
    examples = [Example("What is", "a Bird?", "x"), Example("what  is a\tbird?", "", "y"), Example("Another", "", "z")]
    assert question_of(examples[0]) == question_of(examples[1]) == "what is a bird?"
    kept, left_out = without_leaks(examples, [Example("WHAT IS A BIRD?", "", "an owl")])
    assert (kept, left_out) == ([examples[2]], 2)
    assert without_leaks(examples, []) == (examples, 0)


def test_pairs_have_two_answers_that_differ():
    examples = [
        Example("a", "", "yes", rejected="no"),
        Example("b", "", "yes", rejected=" "),
        Example("c", "", "yes", rejected="yes"),
        Example("d", "", "yes"),
    ]
    assert paired(examples) == ([examples[0]], {"empty_rejected_answer": 2, "rejected_is_the_answer": 1})
    assert paired(examples[:1]) == ([examples[0]], {})


# ------------------------------------------------------------------ rows and cells


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        (float("nan"), ""),
        ("None", "None"),
        (" as it is ", " as it is "),
        (3, "3"),
        (3.0, "3"),
        (-2.0, "-2"),
        (0.25, "0.25"),
        (1e15, "1000000000000000.0"),
        (-1e15, "-1000000000000000.0"),
        (1e14, "100000000000000"),
        (float("inf"), "inf"),
        (True, "True"),
        (["ü", 1], '["ü", 1]'),
        ({"a": None}, '{"a": null}'),
    ],
    ids=str,
)
def test_a_cell_as_text(value, expected):
    assert as_text(value) == expected


COLUMNS = {"instruction": ("question", "instruction"), "output": ("answer", "output")}
SOURCE = Source("made-up", "Made up", "MIT", "nowhere", COLUMNS, {})


@pytest.fixture
def read(caplog):
    """A function that returns the examples of rows, and the sentences that were logged meanwhile."""
    caplog.set_level("INFO", logger="fedloom")

    def reading(rows, data=None, by="category", **more):
        caplog.clear()
        found = read_examples(rows, SOURCE, data or DataConfig(path="x"), by, "the file", **more)
        return found, [record.getMessage() for record in caplog.records]

    return reading


def test_rows_without_an_answer_are_counted_and_columns_are_told(read):
    rows = [
        {"question": "a", "answer": "1", "lang": "py"},
        {"question": "b", "answer": "  "},
        {"question": "c", "answer": None},
        {"question": "d", "answer": 4.0, "category": " x ", "lang": "c"},
    ]
    reading, told = read(rows)
    assert [(e.instruction, e.output, e.category) for e in reading.examples] == [("a", "1", ""), ("d", "4", "x")]
    assert reading.empty == 2
    assert list(reading.seen) == ["question", "answer", "lang", "category"]
    assert told == ["made-up: reading instruction from 'question', output from 'answer' (data.columns says otherwise)"]
    assert [e.category for e in read(rows, by="lang")[0].examples] == ["py", "c"]


def test_the_recipe_s_own_columns_come_first(read):
    rows = [{"question": "a", "answer": "1", "other": "2", "context": "i"}]
    data = DataConfig(path="x", columns={"output": "other", "input": "context"})
    reading, told = read(rows, data)
    assert (reading.examples[0].output, reading.examples[0].input) == ("2", "i")
    assert told == ["made-up: reading instruction from 'question' (data.columns says otherwise)"]


def test_what_is_missing_is_a_sentence(read):
    good = [{"question": "a", "answer": "1"}]
    with pytest.raises(UserError, match="the file has no rows"):
        read([])
    assert read([], may_be_empty=True)[0].examples == []
    with pytest.raises(UserError, match=r"all 1 rows of the file have an empty answer in the column 'answer'"):
        read([{"question": "a", "answer": ""}])
    assert read([{"question": "a", "answer": ""}], may_be_empty=True)[0].empty == 1
    with pytest.raises(
        UserError, match=r"no column 'question' for the instruction; its columns are answer: .*instruction=NAME"
    ):
        read([{"answer": "1"}])
    with pytest.raises(UserError, match=r"no column 'lang' to split by; its columns are question, answer"):
        read(good, by="lang")
    with pytest.raises(UserError, match=r"no column 'notes' for the input"):
        read(good, DataConfig(path="x", columns={"input": "notes"}))
