"""What is asked in a test is, token for token, what was trained on, under every template."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from fedloom.common.errors import UserError
from fedloom.data.corpus import Corpus, Example
from fedloom.data.prompts import Template
from fedloom.data.tokenization import tokenise
from fedloom.evaluation import score as scoring
from fedloom.evaluation.score import choose, generate
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.attention import packed as attention
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig
from tests.helpers import tiny

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
STYLES = ["chat", "alpaca", "plain"]

EXAMPLES = (
    Example("Add.", "1 and 2", "3", "sums"),
    Example("Say hello.", "", "hello", "words"),
    Example("Where is Zürich?", "a map — with Ümlauts 🗺", "in the north", "words"),
    Example("none: None", "", "None at all", "words"),
)


def template(style: str, system: str | None = None) -> Template:
    return Template.choose(tiny.tokenizer(CHAT), style, system)


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    base = tiny.causal_lm(max_position_embeddings=1024).requires_grad_(False)
    return attach(Base(base, tiny.tokenizer(CHAT), ""), AdapterConfig(rank=2), 0)


@torch.no_grad()
def plain_logits(model: AdaptedModel, ids: list[int]) -> torch.Tensor:
    """[length, vocabulary] through transformers' own attention."""
    with attention.use_attention(model.causal_lm, "eager"):
        return model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def corpus(examples: tuple[Example, ...] = EXAMPLES) -> Corpus:
    return Corpus("test", examples, "CC0-1.0", "made up")


# ------------------------------------------------------------------ the same tokens in training and in evaluation


@pytest.mark.parametrize("style", STYLES)
def test_a_generated_answer_is_asked_with_the_training_sequences_prompt(model, style, monkeypatch):
    """Spies on what the model is given, padding and all, and on what it was trained on."""
    seen: list[list[int]] = []

    def spy(input_ids, attention_mask, generation_config):
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist())  # padding only on the left
            seen.append(ids[mask.bool()].tolist())
        return torch.cat([input_ids, torch.full((len(input_ids), 1), 2)], dim=1)

    monkeypatch.setattr(model.module, "generate", spy)
    generate(model, template(style), EXAMPLES, batch_size=3, max_length=1000, max_new_tokens=4)
    sequences = tokenise(corpus(), template(style), 1000, None)
    trained = [sequences[i].ids[: sequences[i].prompt].tolist() for i in range(len(EXAMPLES))]
    assert sorted(seen) == sorted(trained)
    assert all(len(prompt) > 4 for prompt in trained)


@pytest.mark.parametrize("style", STYLES)
def test_the_right_choice_is_scored_as_its_training_sequence(model, style, monkeypatch):
    given: list[tuple[list[int], int]] = []
    batched = scoring.batch_by_length

    def spy(sequences, size, **options):
        given.extend((s.ids.tolist(), s.prompt) for s in sequences)
        return batched(sequences, size, **options)

    monkeypatch.setattr(scoring, "batch_by_length", spy)
    asked = Example("Which is a bird?", "", "B. owl", "birds", choices=("dog", "owl", "eel"))
    choose(model, template(style), [asked], batch_size=2, max_length=1000)
    trained = tokenise(corpus((asked,)), template(style), 1000, None)[0]
    assert given[1] == (trained.ids.tolist(), trained.prompt)
    assert len(given) == 3
    assert {tuple(ids[:prompt]) for ids, prompt in given} == {tuple(trained.ids[: trained.prompt].tolist())}


@pytest.mark.parametrize("style", STYLES)
def test_a_sequence_is_its_prompt_then_its_answer_and_an_end(style):
    written = template(style)
    sequences = tokenise(corpus(), written, 1000, None)
    for i, example in enumerate(EXAMPLES):
        ids, prompt = sequences[i].ids.tolist(), sequences[i].prompt
        assert ids[:prompt] == written.prompt_ids(example)
        assert ids[-1] == written.tokenizer.eos_token_id
        assert written.tokenizer.decode(ids[prompt:-1]) == example.output


# ------------------------------------------------------------------ what a prompt says


def test_alpacas_two_forms():
    with_input = template("alpaca").prompt_text(EXAMPLES[0])
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    without = template("alpaca").prompt_text(EXAMPLES[1])
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hello.\n\n### Response:\n"
    )


def test_braces_in_data_are_only_text():
    text = template("alpaca").prompt_text(Example("Fill {instruction} {0} in.", "{input}{", "x"))
    assert "Fill {instruction} {0} in.\n\n### Input:\n{input}{\n" in text


def test_plain_is_the_text_and_a_line_break():
    assert template("plain").prompt_text(EXAMPLES[0]) == "Add.\n\n1 and 2\n"
    assert template("plain").prompt_text(EXAMPLES[1]) == "Say hello.\n"
    assert template("plain").prompt_ids(EXAMPLES[1])[0] == 1  # the tokenizer's own beginning


def test_chat_writes_its_own_special_tokens_once():
    ids = template("chat").prompt_ids(EXAMPLES[1])
    assert template("chat").prompt_text(EXAMPLES[1]) == "<s>user\nSay hello.</s>\n<s>assistant\n"
    assert ids.count(1) == 2  # one for each turn, none added before them
    assert ids.count(2) == 1
    library = tiny.tokenizer(CHAT).apply_chat_template(
        [{"role": "user", "content": "Say hello."}], add_generation_prompt=True, return_dict=False
    )
    assert ids == list(library)


def test_a_system_message_comes_first_and_may_be_empty():
    assert template("chat", "Be brief.").prompt_text(EXAMPLES[1]).startswith("<s>system\nBe brief.</s>\n<s>user\n")
    assert template("chat", "").prompt_text(EXAMPLES[1]).startswith("<s>system\n</s>\n")
    assert "system" not in template("chat").prompt_text(EXAMPLES[1])


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_none_is_never_written(style, data):
    text = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), max_size=20)
    example = Example(data.draw(text).replace("None", ""), data.draw(text).replace("None", ""), "x")
    assert "None" not in template(style).prompt_text(example)
    assert "Input" not in template(style).prompt_text(Example("i", "", "x"))


def test_auto_takes_the_models_own_template_where_it_has_one():
    assert Template.choose(tiny.tokenizer(CHAT), "auto").style == "chat"
    assert Template.choose(tiny.tokenizer(), "auto").style == "alpaca"
    with pytest.raises(UserError, match="no chat template"):
        Template.choose(tiny.tokenizer(), "chat")


def test_a_tokenizer_that_closes_every_text_does_not_close_a_prompt():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("a")["input_ids"][-1] == 2
    assert Template(tokenizer, "plain").prompt_ids(EXAMPLES[1])[-1] != 2
    assert Template(tokenizer, "plain").answer_ids("a").count(2) == 1


def test_templates_that_write_differently_have_different_names():
    other = tiny.tokenizer(CHAT.replace("assistant", "model"))
    made = [
        template("chat"),
        template("chat", ""),
        template("chat", "Be brief."),
        template("alpaca"),
        template("plain"),
    ]
    assert len({t.name for t in [*made, Template.choose(other, "chat")]}) == 6


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_batched_generation_gives_each_questions_own_greedy_answer(model, style):
    """By hand: one question at a time, token by token, through plain forwards."""
    written = template(style)
    answers = generate(model, written, EXAMPLES, batch_size=3, max_length=1000, max_new_tokens=6)
    for example, answer in zip(EXAMPLES, answers, strict=True):
        ids = written.prompt_ids(example)
        start = len(ids)
        for _ in range(6):
            ids.append(int(plain_logits(model, ids)[-1].argmax()))
            if ids[-1] == 2:
                break
        assert answer == model.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("packed", [True, False])
def test_choices_are_ranked_by_the_answers_log_likelihood(model, packed):
    written = template("plain")
    questions = [
        Example("Pick.", "", "A. ant", choices=("ant", "a very much longer choice", "owl")),
        Example("Pick another one.", "", "C. owl", choices=("ant", "bee", "owl", "yak")),
    ]
    picked = choose(model, written, questions, batch_size=3, max_length=1000, packed=packed)
    for question, choice in zip(questions, picked, strict=True):
        scores = {}
        for letter, text in zip("ABCD", question.choices, strict=False):
            prompt, answer = written.prompt_ids(question), written.answer_ids(f"{letter}. {text}")
            log = plain_logits(model, prompt + answer).log_softmax(-1)
            scores[f"{letter}. {text}"] = sum(float(log[len(prompt) - 1 + k, token]) for k, token in enumerate(answer))
        assert choice == max(scores, key=scores.get)
        assert np.ptp(list(scores.values())) > 0.1


@pytest.mark.parametrize("style", ["chat", "alpaca", "plain"])
def test_answered_examples_stand_in_front_as_they_were_trained(style):
    made = tiny.tokenizer("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>")
    template = Template(made, style)
    shots = [Example("one", "", "1"), Example("two", "given", "2")]
    question = Example("three", "given", "3")
    text = template.prompt_text(question, shots)
    assert template.prompt_text(question, []) == template.prompt_text(question)
    assert text.endswith(template.prompt_text(question)[-20:]) and "3" not in text
    places = [text.index(piece) for piece in ("one", "1", "two", "given", "2", "three")]
    assert places == sorted(places)
    if style != "chat":
        assert text.startswith(template.prompt_text(shots[0]) + "1\n\n" + template.prompt_text(shots[1]) + "2\n\n")
    else:
        assert text.count("<assistant>") == 3 and text.count("<user>") == 3
