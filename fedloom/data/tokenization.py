"""Tokenise a corpus once and store it in a cache whose key is (corpus, tokenizer, template, max_length).

A sequence is prompt ids, then answer ids, shortened by this rule: a prompt of more than `max_length` − `MIN_ANSWER`
    tokens
loses its beginning; then the answer loses its end. The rest of a prompt does not depend on its answer, so an evaluation
uses exactly the prompts of training. Every shortened sequence is counted. The cache stores text as ids, under
`$FEDLOOM_HOME/tokenised`; `fedloom fetch --clear tokenised` deletes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from fedloom.data.corpus import Corpus, Example
from fedloom.data.prompts import Template

#: Tokens that a prompt leaves for its answer, or half the limit if that is less.
MIN_ANSWER = 8


@dataclass(frozen=True)
class TokenSequence:
    """One tokenised example.

    Attributes:
        ids: [length] int.
        prompt: how many ids at the start are the prompt, and not trained on.
    """

    ids: np.ndarray
    prompt: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.prompt


class TokenisedCorpus:
    """All sequences of a list of examples in flat arrays; indexing returns a `TokenSequence`.

    Attributes:
        truncated: number of sequences over the limit.
        truncated_tokens: number of tokens that they lost together.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._ids, self._starts, self._prompts = arrays["ids"], arrays["starts"], arrays["prompts"]
        self._lost = arrays["lost"]
        self._rejected = arrays.get("rejected"), arrays.get("rejected_starts")

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> TokenSequence:
        return TokenSequence(self._ids[self._starts[index] : self._starts[index + 1]], int(self._prompts[index]))

    def pair(self, index: int) -> tuple[TokenSequence, TokenSequence]:
        """Return the sequences with the preferred and with the rejected answer; they have the same prompt.

        Raises ValueError if the corpus has no rejected answers.
        """
        answers, starts = self._rejected
        if answers is None or starts is None:
            raise ValueError("this corpus has no rejected answers")
        preferred = self[index]
        answer = answers[starts[index] : starts[index + 1]]
        ids = np.concatenate([preferred.ids[: preferred.prompt], answer])
        return preferred, TokenSequence(ids, preferred.prompt)

    @property
    def truncated(self) -> int:
        return int((self._lost > 0).sum())

    @property
    def truncated_tokens(self) -> int:
        return int(self._lost.sum())

    def supervised_tokens(self, indices: Sequence[int]) -> int:
        """Count the tokens with a label in these examples."""
        at = np.asarray(indices, dtype=np.int64)
        return int((self._starts[at + 1] - self._starts[at] - self._prompts[at]).sum())


def tokenise(corpus: Corpus, template: Template, max_length: int, cache: Path | None) -> TokenisedCorpus:
    """Tokenise `corpus.examples`, or read them from the cache. With `cache` None nothing is stored on disk."""
    if cache is None:
        return TokenisedCorpus(encode(corpus.examples, template, max_length))
    key = f"{corpus.digest()}/{tokenizer_digest(template.tokenizer)}/{template.name}/{max_length}/prompt-first/{MIN_ANSWER}"
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            return TokenisedCorpus(load_file(path))
        except (SafetensorError, KeyError):
            path.unlink()  # damaged by an earlier crash: written again below
    arrays = encode(corpus.examples, template, max_length)
    with contextlib.suppress(OSError, SafetensorError):  # a full or read-only cache only costs time
        _store(arrays, path)
    return TokenisedCorpus(arrays)


def _store(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write a file of the cache completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(arrays, scratch)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def encode(examples: Sequence[Example], template: Template, max_length: int) -> dict[str, np.ndarray]:
    """Return ids [all tokens], starts [n + 1], prompts [n], and lost [n], the tokens cut from each.

    With rejected answers also rejected [all their tokens] and rejected_starts [n + 1]; `lost` counts their cut tokens
    too.
    """
    sequences = [fit(template.prompt_ids(e), template.answer_ids(e.output), max_length) for e in examples]
    lengths = [len(prompt) + len(answer) for prompt, answer, _ in sequences]
    flat = [i for prompt, answer, _ in sequences for i in (*prompt, *answer)]
    lost = np.asarray([lost for _, _, lost in sequences], dtype=np.int64)
    rejected: dict[str, np.ndarray] = {}
    if any(e.rejected for e in examples):
        answers = [template.answer_ids(e.rejected) for e in examples]
        kept = [a[: max_length - len(prompt)] for a, (prompt, _, _) in zip(answers, sequences, strict=True)]
        lost += np.asarray([len(a) - len(k) for a, k in zip(answers, kept, strict=True)], dtype=np.int64)
        rejected = {
            "rejected": np.asarray([i for answer in kept for i in answer], dtype=np.int32),
            "rejected_starts": np.concatenate([[0], np.cumsum([len(k) for k in kept])]).astype(np.int64),
        }
    return {
        "ids": np.asarray(flat, dtype=np.int32),
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "prompts": np.asarray([len(prompt) for prompt, _, _ in sequences], dtype=np.int32),
        "lost": lost,
        **rejected,
    }


def fit(prompt: list[int], answer: list[int], max_length: int) -> tuple[list[int], list[int], int]:
    """Shorten to `max_length` by the rule above: return (prompt, answer, tokens lost).

    >>> fit([1, 2, 3], list(range(20)), 12)[1] == list(range(9))
    True
    """
    kept = fit_prompt(prompt, max_length)
    kept_answer = answer[: max_length - len(kept)]
    return kept, kept_answer, len(prompt) + len(answer) - len(kept) - len(kept_answer)


def fit_prompt(prompt: list[int], max_length: int) -> list[int]:
    """Return the end of a prompt that fits into `max_length` with room for an answer."""
    return prompt[max(0, len(prompt) - max_length + min(MIN_ANSWER, max_length // 2)) :]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest that changes whenever the same text could give other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{text}/{tokenizer.eos_token_id}".encode()).hexdigest()
