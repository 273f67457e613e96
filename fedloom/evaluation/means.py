"""What an evaluation found: sums that clients and server measured, put together into means. Arithmetic on numbers only.

Sums have `loss_sum`, `tokens`, `right` and `questions`; under preference tuning also `pairs`, `preferred`, `margin_sum` and
`preference_loss_sum`. This file does not know who measured them or when.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Sums = Mapping[str, float]


def total(sums: Iterable[Sums]) -> dict[str, float]:
    """Key by key; of no sums at all, zeros."""
    added = dict.fromkeys(("loss_sum", "tokens", "right", "questions"), 0.0)
    for each in sums:
        for key, value in each.items():
            added[key] = added.get(key, 0.0) + value
    return added


def means(sums: Sums) -> dict[str, Any]:
    """Loss of a token and share of right answers, each with what it is the mean over; null of nothing."""
    tokens, questions = int(sums["tokens"]), int(sums["questions"])
    return {
        "loss": sums["loss_sum"] / tokens if tokens else None,
        "tokens": tokens,
        "score": sums["right"] / questions if questions else None,
        "questions": questions,
    }


def together(own: Mapping[str, Sums], asked: Sums | None = None) -> dict[str, Any]:
    """All clients as one. `asked`: the server's own questions, which stand in for theirs."""
    added = total(own.values())
    return means({**added, "right": asked["right"], "questions": asked["questions"]} if asked else added)


def everywhere(sums: Mapping[str, Sums]) -> dict[str, Any]:
    """The mean over clients' models, each measured on everybody's data."""
    return {
        "loss": pooled_mean([(m["loss_sum"] / m["tokens"], 1) for m in sums.values() if m["tokens"]]),
        "score": pooled_mean([(m["right"] / m["questions"], 1) for m in sums.values() if m["questions"]]),
        "questions": max((int(m["questions"]) for m in sums.values()), default=0),
    }


def preference(own: Mapping[str, Sums]) -> dict[str, Any] | None:
    """Preference tuning on the clients' own test data: the mean loss and margin of a pair, and how often the preferred
    answer won. None where no pair was measured."""
    added = total(own.values())
    pairs = int(added.get("pairs", 0))
    if not pairs:
        return None
    return {
        "loss": added["preference_loss_sum"] / pairs,
        "accuracy": added["preferred"] / pairs,
        "margin": added["margin_sum"] / pairs,
        "pairs": pairs,
    }


def pooled_mean(values: Sequence[tuple[float, float]]) -> float | None:
    """Σ sums / Σ counts over (sum, count) pairs; None where the counts add up to nothing."""
    count = sum(n for _, n in values)
    return sum(s for s, _ in values) / count if count else None
