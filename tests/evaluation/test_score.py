"""The paired evaluation from questions to verdicts: a suite of choices and a suite of answers, end to end."""

from __future__ import annotations

import json

import pytest
import torch

import fedloom
from fedloom.data.corpus import Example
from fedloom.data.prompts import Template
from fedloom.evaluation import score as module
from fedloom.evaluation.score import choose, generate, score
from fedloom.evaluation.suites import GSM, MULTIPLE_CHOICE, Suite
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.forward import default_peft_model
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig, Recipe
from tests.helpers import tiny

HOW = {"batch_size": 3, "max_length": 200}


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return attach(Base(tiny.causal_lm().requires_grad_(False), tiny.tokenizer(), ""), AdapterConfig(rank=2, alpha=4), 0)


@pytest.fixture(scope="module")
def template(model) -> Template:
    return Template(model.tokenizer, "plain")


OPTIONS = ("an owl", "a very long way to say a dog", "eel", "yak")


def question(number: int, right: int, options: tuple[str, ...] = OPTIONS) -> Example:
    return Example(f"Which is number {number}?", "", f"{'ABCD'[right]}. {options[right]}", choices=options)


def likelihood(model: AdaptedModel, template: Template, asked: Example, text: str) -> float:
    """log p(answer and end | prompt), from one plain forward pass over the whole sequence."""
    prompt, answer = template.prompt_ids(asked), template.answer_ids(text)
    with torch.no_grad():
        logits = default_peft_model(model)(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


def most_likely(model: AdaptedModel, template: Template, asked: Example) -> str:
    texts = [f"{letter}. {text}" for letter, text in zip("ABCD", asked.choices, strict=False)]
    return max(texts, key=lambda text: likelihood(model, template, asked, text))


@pytest.mark.parametrize("packed", [True, False])
def test_a_choice_is_right_where_the_most_likely_text_is_the_answer(model, template, packed):
    """Every question with every answer as the right one: exactly one of four is, and it is the most likely one."""
    asked = [question(number, right) for number in range(5) for right in range(4)]
    verdicts = score(model, template, MULTIPLE_CHOICE, asked, packed=packed, **HOW)
    assert verdicts == [most_likely(model, template, q) == q.output for q in asked]
    assert sum(verdicts) == 5
    assert all(type(v) is bool for v in verdicts)
    assert score(model, template, MULTIPLE_CHOICE, asked, packed=packed, **{**HOW, "batch_size": 100}) == verdicts
    assert score(model, template, MULTIPLE_CHOICE, [], packed=packed, **HOW) == []


def test_of_equally_likely_choices_the_first_is_taken(model, template):
    """Two answers whose first eight tokens, which are all that fits, are the same."""
    options = ("eel eel eel", "eel eel yak")
    for order in (options, options[::-1]):
        asked = Example("Which is it?", "", order[1], choices=order)
        assert choose(model, template, [asked], batch_size=1, max_length=16) == [order[0]]
        assert score(model, template, MULTIPLE_CHOICE, [asked], batch_size=1, max_length=16) == [False]


def test_a_choice_that_is_too_long_is_cut_and_still_compared(model, template):
    """Of twenty tokens at most: the prompt keeps its end, and the answers lose theirs, as in training."""
    asked = [question(number, 0, ("a" * 40, "b" * 40)) for number in range(3)]
    picked = choose(model, template, asked, batch_size=2, max_length=20)
    for q, choice in zip(asked, picked, strict=True):
        values = {}
        for letter, text in zip("AB", q.choices, strict=True):
            prompt = template.prompt_ids(q)[-12:]
            answer = template.answer_ids(f"{letter}. {text}")[:8]
            with torch.no_grad():
                logits = default_peft_model(model)(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            values[f"{letter}. {text}"] = sum(float(logits[11 + i, token]) for i, token in enumerate(answer))
        assert choice == max(values, key=values.__getitem__)


def test_generated_answers_are_judged_by_the_suite_one_by_one_and_in_order(model, template):
    asked = [Example("Say " + "x" * (5 * i), "", str(i)) for i in (3, 0, 2, 1)]
    texts = generate(model, template, asked, max_new_tokens=6, **HOW)
    assert len(set(texts)) > 1
    seen: list[tuple[str, str]] = []

    def right(example: Example, answer: str) -> bool:
        seen.append((example.output, answer))
        return example.output in ("0", "1")

    suite = Suite("made-up", "generate", 6, right, "")
    assert score(model, template, suite, asked, **HOW) == [False, True, False, True]
    assert seen == [(q.output, text) for q, text in zip(asked, texts, strict=True)]


@pytest.mark.parametrize(("given", "used"), [(None, 256), (9, 9)])
def test_an_answer_is_as_long_as_the_suite_says_or_the_recipe(model, template, monkeypatch, given, used):
    lengths = []
    monkeypatch.setattr(
        module, "generate", lambda *a, max_new_tokens, **k: lengths.append(max_new_tokens) or ["#### 4"]
    )
    asked = [Example("2 + 2?", "", "#### 4")]
    assert score(model, template, GSM, asked, max_new_tokens=given, **HOW) == [True]
    assert lengths == [used]


def test_answers_do_not_depend_on_who_is_in_the_batch(model, template):
    asked = [Example("Say " + "x" * (7 * i), "", "") for i in range(5)]
    alone = [generate(model, template, [q], max_new_tokens=5, **HOW)[0] for q in asked]
    for size in (1, 2, 5):
        assert generate(model, template, asked, batch_size=size, max_length=200, max_new_tokens=5) == alone
    assert all(text == text.strip() for text in alone)
    longer = generate(model, template, asked, max_new_tokens=9, **HOW)
    assert all(one.startswith(short) for one, short in zip(longer, alone, strict=True))


def test_a_long_prompt_keeps_its_end(model, template):
    short = Example("x" * 30, "", "")
    long = Example("y" * 50 + "x" * 30, "", "")
    how = {"batch_size": 1, "max_length": 24, "max_new_tokens": 4}
    assert generate(model, template, [long], **how) == generate(model, template, [short], **how)


def test_a_run_with_a_suite_of_choices(tiny_model, tmp_path, monkeypatch):
    """Through the whole run: each client answers its own questions, sums travel, and the summary has their share.

    x's questions have the answer that the model takes without training, y's another one. With a learning rate of almost
    nothing, x is right every time and y never.
    """
    model = attach(
        Base(tiny.causal_lm().requires_grad_(False), tiny.tokenizer(), ""), AdapterConfig(rank=2, alpha=4), 0
    )
    template, rows = Template(model.tokenizer, "plain"), []
    for number in range(24):
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", OPTIONS, strict=True))
        asked = Example(f"Number {number}?", options, "", choices=OPTIONS)
        taken = most_likely(model, template, asked)
        other = next(f"{letter}. {text}" for letter, text in zip("ABCD", OPTIONS, strict=True) if letter != taken[0])
        answer = taken if number % 2 == 0 else other
        rows.append(
            {"question": asked.instruction, "options": options, "answer": answer, "specialty": "xy"[number % 2]}
        )
    (tmp_path / "medmcqa").mkdir()
    (tmp_path / "medmcqa" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    recipe = Recipe.parse(
        {
            "name": "tiny", "model": str(tiny_model),
            "data": {"corpus": "fed-medmcqa", "max_length": 120, "template": "plain"},
            "split": {"splitter": "meta", "test": 0.5}, "adapter": {"rank": 2, "alpha": 4},
            "train": {"steps": 1, "batch_size": 2, "lr": 1e-12}, "federation": {"rounds": 1},
            "runtime": {"threads": 1, "device": "cpu"}, "evaluation": {"answers": 0},
        }
    )  # fmt: skip
    summary = fedloom.run(recipe, out=tmp_path / "run").summary
    assert (summary["score"]["before"], summary["score"]["after"]) == (0.5, 0.5)
    assert summary["score"]["worst_client"] == {"client": "y", "before": 0.0, "after": 0.0}
