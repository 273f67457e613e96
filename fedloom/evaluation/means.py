"""Evaluation means: arithmetic on the sums that clients and the server measured. It does not know who measured or when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypedDict


@dataclass(frozen=True)
class Sums:
    """What one party measured. Messages have these as metrics, by the same names.

    Attributes:
        loss_sum: the losses of `tokens` tokens added up.
        right: right answers, of `questions`.
        pairs: pairs of preference tuning; the last three are sums over them (training/objectives.py).
    """

    loss_sum: float = 0.0
    tokens: float = 0.0
    right: float = 0.0
    questions: float = 0.0
    pairs: float = 0.0
    preferred: float = 0.0
    margin_sum: float = 0.0
    preference_loss_sum: float = 0.0

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> Sums:
        """Read the sums of an update's metrics, which may have further keys. Raises KeyError without the first four."""
        given = {key: metrics[key] for key in ("loss_sum", "tokens", "right", "questions")}
        return cls(**given, **{key: metrics[key] for key in NAMES[len(given) :] if key in metrics})

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in NAMES))


NAMES = tuple(field.name for field in fields(Sums))


class Means(TypedDict):
    """The mean loss of a token and the share of right answers, each with its count. A mean over nothing is None."""

    loss: float | None
    tokens: int
    score: float | None
    questions: int


class PreferenceMeans(TypedDict):
    """`loss` and `margin` are means over pairs; `accuracy` is the share of pairs in which the preferred answer won."""

    loss: float
    accuracy: float
    margin: float
    pairs: int


def add_sums(sums: Iterable[Sums]) -> Sums:
    """Add sums up; zeros where there are none."""
    return sum(sums, Sums())


def means(sums: Sums) -> Means:
    """Return the means of one party's sums."""
    tokens, questions = int(sums.tokens), int(sums.questions)
    return {
        "loss": sums.loss_sum / tokens if tokens else None,
        "tokens": tokens,
        "score": sums.right / questions if questions else None,
        "questions": questions,
    }


def combine_clients(own: Mapping[str, Sums], asked: Sums | None = None) -> Means:
    """Return the means over all clients' data. `asked`: sums of the server's own questions, which replace the clients'."""
    added = add_sums(own.values())
    return means(replace(added, right=asked.right, questions=asked.questions) if asked else added)


def mean_over_models(sums: Mapping[str, Sums]) -> Means:
    """Return the mean over clients' models. Each model was measured on the data of all clients, which are counted once."""
    return {
        "loss": pooled_mean([(m.loss_sum / m.tokens, 1) for m in sums.values() if m.tokens]),
        "tokens": max((int(m.tokens) for m in sums.values()), default=0),
        "score": pooled_mean([(m.right / m.questions, 1) for m in sums.values() if m.questions]),
        "questions": max((int(m.questions) for m in sums.values()), default=0),
    }


def preference_means(own: Mapping[str, Sums]) -> PreferenceMeans | None:
    """Return the means of preference tuning on the clients' own test data, or None where no pair was measured."""
    added = add_sums(own.values())
    pairs = int(added.pairs)
    if not pairs:
        return None
    return {
        "loss": added.preference_loss_sum / pairs,
        "accuracy": added.preferred / pairs,
        "margin": added.margin_sum / pairs,
        "pairs": pairs,
    }


def pooled_mean(values: Sequence[tuple[float, float]]) -> float | None:
    """Return Σ sums / Σ counts over (sum, count) pairs; None where the counts add up to 0."""
    count = sum(n for _, n in values)
    return sum(s for s, _ in values) / count if count else None
