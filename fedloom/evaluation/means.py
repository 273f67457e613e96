"""Evaluation means: arithmetic on the sums that clients and the server measured.

Sums have `loss_sum`, `tokens`, `right` and `questions`. Under preference tuning they also have `pairs`, `preferred`,
`margin_sum` and `preference_loss_sum`. This file does not know who measured them or when.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Sums = Mapping[str, float]


def add_sums(sums: Iterable[Sums]) -> dict[str, float]:
    """Add sums key by key. The first four keys are always there: zero where nothing was measured."""
    added = dict.fromkeys(("loss_sum", "tokens", "right", "questions"), 0.0)
    for each in sums:
        for key, value in each.items():
            added[key] = added.get(key, 0.0) + value
    return added


def means(sums: Sums) -> dict[str, Any]:
    """Return the mean loss of a token and the share of right answers, each with its count. A mean over nothing is None."""
    tokens, questions = int(sums["tokens"]), int(sums["questions"])
    return {
        "loss": sums["loss_sum"] / tokens if tokens else None,
        "tokens": tokens,
        "score": sums["right"] / questions if questions else None,
        "questions": questions,
    }


def combine_clients(own: Mapping[str, Sums], asked: Sums | None = None) -> dict[str, Any]:
    """Return the means over all clients' data. `asked`: sums of the server's own questions, which replace the clients'."""
    added = add_sums(own.values())
    return means({**added, "right": asked["right"], "questions": asked["questions"]} if asked else added)


def mean_over_models(sums: Mapping[str, Sums]) -> dict[str, Any]:
    """Return the mean over clients' models. Each model was measured on the data of all clients."""
    return {
        "loss": pooled_mean([(m["loss_sum"] / m["tokens"], 1) for m in sums.values() if m["tokens"]]),
        "score": pooled_mean([(m["right"] / m["questions"], 1) for m in sums.values() if m["questions"]]),
        "questions": max((int(m["questions"]) for m in sums.values()), default=0),
    }


def preference_means(own: Mapping[str, Sums]) -> dict[str, Any] | None:
    """Return the means of preference tuning on the clients' own test data, or None where no pair was measured.

    `loss` and `margin` are means over pairs; `accuracy` is the share of pairs in which the preferred answer won.
    """
    added = add_sums(own.values())
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
    """Return Σ sums / Σ counts over (sum, count) pairs; None where the counts add up to 0."""
    count = sum(n for _, n in values)
    return sum(s for s, _ in values) / count if count else None
