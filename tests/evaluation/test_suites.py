"""Suites: what makes an answer right."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedloom.common.errors import UserError
from fedloom.common.registry import suites as table
from fedloom.data.corpus import Example
from fedloom.evaluation import suites
from fedloom.evaluation.suites import GSM, MULTIPLE_CHOICE, SKILLS, Suite, choice_texts, final_number


def example(output: str, **values) -> Example:
    return Example("question", "", output, **values)


def test_every_registered_suite_is_one():
    for name in ("skills", "gsm", "multiple-choice"):
        suite = table.get(name)
        assert isinstance(suite, Suite) and suite.name == name and suite.note
        assert (suite.right is None) == (suite.kind == "choice")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("6 * 3 = 18\n#### 18", True),
        ("#### 18.0", True),
        ("#### $18.", True),
        ("####18", True),
        ("#### 1,8", True),
        ("#### 18 eggs\nmore words", True),
        ("first #### 3, then #### 18", True),
        ("#### 18 and then #### 3", False),
        ("#### 180", False),
        ("#### 1 8", False),
        ("#### -18", False),
        ("18", False),
        ("#### eighteen", False),
        ("", False),
    ],
)
def test_gsm_compares_the_number_after_the_last_mark(answer, right):
    assert GSM.right is not None
    assert GSM.right(example("She makes 18.\n#### 18"), answer) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 1,234.50", "1234.5"), ("#### $-5", "-5"), ("#### -$5", "-5"), ("#### .5", "0.5"), ("#### ٣", None)],
)
def test_final_number(text, number):
    found = final_number(text)
    assert (found is None) if number is None else (found is not None and float(found) == float(number))


def test_gsm_refuses_a_corpus_without_numbers():
    with pytest.raises(
        UserError, match=r"gsm needs answers ending in '#### number', not 'some words'.*evaluation.suite"
    ):
        suites.gsm_right(example("some words"), "#### 1")


def test_choices_are_written_as_in_training():
    lettered = example("B. mild", choices=("hot", "mild", "cold"))
    assert choice_texts(lettered) == ["A. hot", "B. mild", "C. cold"]
    plain = example("mild", choices=("hot", "mild", "cold"))
    assert choice_texts(plain) == ["hot", "mild", "cold"]
    assert MULTIPLE_CHOICE.kind == "choice"
    with pytest.raises(UserError, match=r"multiple-choice needs an answer among 0 choices, not 'mild'"):
        choice_texts(example("mild"))


def test_skills_are_judged_by_the_task_s_own_verifier():
    pytest.importorskip("reasoning_gym")
    entry = {"question": "4 * 3", "answer": "12", "metadata": {}}
    product = example("12", task="products", reference=entry)
    assert SKILLS.right is not None
    assert SKILLS.right(product, " 12\n") and SKILLS.right(product, "12.0")
    for wrong in ("13", "the answer is 12", "12 12", ""):
        assert not SKILLS.right(product, wrong), wrong
    with pytest.raises(UserError, match=r"no verifier for the task 'juggling'"):
        SKILLS.right(example("x", task="juggling", reference=entry), "x")
    with pytest.raises(UserError, match=r"needs examples with a verifier's reference"):
        SKILLS.right(example("x", task="products"), "x")


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    suites._verifier.cache_clear()
    with pytest.raises(UserError, match=r'pip install "fedloom\[skills\]"'):
        suites.skill_right(example("12", task="products", reference={}), "12")


def test_suites_import_no_torch():
    script = "import sys, fedloom; before = 'torch' in sys.modules; import fedloom.evaluation.suites; "
    script += "assert before or 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
