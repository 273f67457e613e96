"""The truncation rule, and a cache that gives the same arrays or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data import tokenization
from fedloom.data.corpus import Corpus, Example
from fedloom.data.prompts import Template
from fedloom.data.tokenization import MIN_ANSWER, encode, fit, fit_prompt, tokenise, tokenizer_digest
from tests.helpers import tiny

PLAIN = Template(tiny.tokenizer(), "plain")


def corpus(n: int = 12) -> Corpus:
    examples = tuple(Example(r["instruction"], r["input"], r["output"], r["category"]) for r in tiny.rows(n))
    return Corpus("test", examples, "CC0-1.0", "made up")


# ------------------------------------------------------------------ truncation


@given(st.integers(0, 60), st.integers(1, 60), st.integers(8, 64))
def test_the_truncation_rule(prompt_length, answer_length, limit):
    prompt, answer = list(range(prompt_length)), list(range(100, 100 + answer_length))
    kept_prompt, kept_answer, lost = fit(prompt, answer, limit)
    assert len(kept_prompt) + len(kept_answer) <= limit
    assert kept_prompt == fit_prompt(prompt, limit)  # whatever the answer: what an evaluation asks
    assert lost == prompt_length + answer_length - len(kept_prompt) - len(kept_answer)
    assert kept_answer == answer[: len(kept_answer)]  # the answer loses its end
    assert kept_prompt == prompt[prompt_length - len(kept_prompt) :]  # the prompt loses its beginning
    room = min(MIN_ANSWER, limit // 2)
    assert len(kept_answer) >= min(answer_length, room)
    assert (kept_prompt == prompt) == (prompt_length <= limit - room)  # never shortened without need
    if kept_answer != answer:
        assert len(kept_prompt) + len(kept_answer) == limit


def test_what_is_lost_is_counted_by_sequence():
    arrays = encode(corpus().examples, PLAIN, 20)
    whole = encode(corpus().examples, PLAIN, 500)
    lengths, before = np.diff(arrays["starts"]), np.diff(whole["starts"])
    assert arrays["lost"].tolist() == (before - lengths).tolist()
    assert lengths.max() == 20
    sequences = tokenise(corpus(), PLAIN, 20, None)
    assert sequences.truncated == int((before != lengths).sum()) > 0
    assert sequences.truncated_tokens == int((before - lengths).sum())
    assert tokenise(corpus(), PLAIN, 500, None).truncated == 0


def test_sequences_are_what_their_texts_are():
    sequences = tokenise(corpus(), PLAIN, 500, None)
    for i, example in enumerate(corpus().examples):
        prompt, answer = PLAIN.prompt_ids(example), PLAIN.answer_ids(example.output)
        assert sequences[i].ids.tolist() == prompt + answer
        assert sequences[i].prompt == len(prompt)
        assert sequences[i].supervised == len(answer)
    assert sequences.supervised_tokens([1, 4]) == sequences[1].supervised + sequences[4].supervised
    assert sequences.supervised_tokens([]) == 0


# ------------------------------------------------------------------ the cache


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(a[i].ids, b[i].ids) and a[i].prompt == b[i].prompt for i in range(len(a))
    )


def test_a_hit_gives_the_same_arrays_and_tokenises_nothing(tmp_path, monkeypatch):
    first = tokenise(corpus(), PLAIN, 20, tmp_path)
    monkeypatch.setattr(tokenization, "encode", lambda *args: pytest.fail("the cache was not used"))
    again = tokenise(corpus(), PLAIN, 20, tmp_path)
    assert same(first, again)
    assert (again.truncated, again.truncated_tokens) == (first.truncated, first.truncated_tokens)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, None], ids=["empty", "zeros", "half"])
def test_a_torn_file_is_made_again(tmp_path, damage):
    first = tokenise(corpus(), PLAIN, 50, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert same(tokenise(corpus(), PLAIN, 50, tmp_path), first)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_another_form_is_made_again(tmp_path):
    from safetensors.numpy import save_file

    first = tokenise(corpus(), PLAIN, 50, tmp_path)
    (path,) = tmp_path.iterdir()
    save_file({"ids": np.zeros(3, dtype=np.int32)}, path)
    assert same(tokenise(corpus(), PLAIN, 50, tmp_path), first)


def variants() -> dict[str, tuple[Corpus, Template, int]]:
    """One thing changed in each that changes the ids."""
    base, examples = corpus(), corpus().examples
    changed = (replace(examples[0], output="another answer"), *examples[1:])
    other = tiny.tokenizer()
    other.eos_token = "<pad>"
    return {
        "the same": (base, PLAIN, 50),
        "an answer": (replace(base, examples=changed), PLAIN, 50),
        "the order": (replace(base, examples=examples[::-1]), PLAIN, 50),
        "the template": (base, Template(tiny.tokenizer(), "alpaca"), 50),
        "the limit": (base, PLAIN, 20),
        "the end token": (base, Template(other, "plain"), 50),
    }


def test_whatever_changes_the_ids_changes_the_key(tmp_path):
    for count, (made, template, limit) in enumerate(variants().values(), 1):
        cached = tokenise(made, template, limit, tmp_path)
        assert same(cached, tokenise(made, template, limit, None))
        assert len(list(tmp_path.iterdir())) == count


def test_what_does_not_change_the_ids_shares_the_file(tmp_path):
    tokenise(corpus(), PLAIN, 50, tmp_path)
    tokenise(replace(corpus(), name="another", source="elsewhere"), PLAIN, 50, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    def full(arrays, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenization, "save_file", full)
    assert same(tokenise(corpus(), PLAIN, 50, tmp_path), tokenise(corpus(), PLAIN, 50, None))
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_digest_knows_the_vocabulary():
    other = tiny.tokenizer()
    other.add_tokens(["copy"])
    assert tokenizer_digest(tiny.tokenizer()) == tokenizer_digest(tiny.tokenizer())
    assert tokenizer_digest(other) != tokenizer_digest(tiny.tokenizer())


def test_texts_that_could_be_confused_have_different_digests():
    """Rows are length-delimited in the digest: moving a word from one field to the next is another corpus."""
    a = Corpus("c", (Example("x", "y", "z"),), "", "")
    b = Corpus("c", (Example("x", "", "yz"),), "", "")
    c = Corpus("c", (), "", "", test=(Example("x", "y", "z"),))
    assert len({a.digest(), b.digest(), c.digest()}) == 3
