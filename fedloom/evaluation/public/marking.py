"""Metrics of one answer: exact numbers, F1 of words, ROUGE, pass@k. Nothing here knows models or files."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from math import comb

#: A sign after a digit is a minus between two numbers, so it is not part of the number.
_NUMBER = re.compile(r"(?:(?<![0-9)])[-+])?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


_STATED = re.compile(rf"####\s*({_NUMBER.pattern})")


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def stated_number(text: str) -> Decimal | None:
    """Return the number after the first ``####``. Later ones are text that the model wrote after its answer."""
    found = _STATED.search(text)
    return _value(found[1]) if found else None


def last_number(text: str) -> Decimal | None:
    """Return the last number anywhere in the text."""
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _words(text: str) -> list[str]:
    """Split into lower-case words without punctuation and articles, as SQuAD compares answers (arXiv 1606.05250)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, accepted: Iterable[str]) -> float:
    """Return 1 if the answer is one of those accepted, up to case, punctuation and articles; else 0."""
    return float(any(_words(answer) == _words(text) for text in accepted))


def f1(answer: str, accepted: Iterable[str]) -> float:
    """Return the best F1 of words in common with an accepted answer (SQuAD's, arXiv 1606.05250)."""
    return max((_overlap(_words(answer), _words(text)) for text in accepted), default=0.0)


def _overlap(said: Sequence[object], right: Sequence[object]) -> float:
    if not said or not right:
        return float(said == right)
    shared = sum((Counter(said) & Counter(right)).values())
    return 2.0 * shared / (len(said) + len(right))


def rouge(answer: str, reference: str, n: int) -> float:
    """Return ROUGE-n's F: word sequences of length n in common. No stemming; words are runs of letters and digits."""
    said, right = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
    grams = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in (said, right)]
    return _overlap(*grams) if grams[0] and grams[1] else 0.0


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the chance that at least one of k answers drawn from these passes: 1 − C(n−c, k) / C(n, k).

    Chen et al., arXiv 2107.03374, equation 1. It is unbiased; 1 − (1 − c/n)^k is not.
    """
    if k > samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1.0 - comb(samples - passed, k) / comb(samples, k)
