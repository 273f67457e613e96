"""Sums of clients as means, by hand: nothing measured is null, and large clients count for more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedloom.evaluation.means import (
    Sums,
    add_sums,
    combine_clients,
    mean_over_models,
    means,
    pooled_mean,
    preference_means,
)

A = Sums(loss_sum=6.0, tokens=3, right=1, questions=2)
B = Sums(loss_sum=1.0, tokens=1, right=3, questions=4)
NOTHING = Sums()


def test_sums_are_read_from_a_message_and_what_else_it_says_is_passed_over():
    metrics = {"loss_sum": 6.0, "tokens": 3, "right": 1, "questions": 2}
    assert Sums.of(metrics) == A == Sums.of({**metrics, "hook/norm": 7.0})
    assert Sums.of({**metrics, "pairs": 2, "margin_sum": -1.5}) == replace(A, pairs=2, margin_sum=-1.5)
    with pytest.raises(KeyError, match="tokens"):
        Sums.of({"loss_sum": 6.0, "right": 1, "questions": 2})


def test_totals_are_key_by_key():
    assert add_sums([]) == NOTHING == Sums(0, 0, 0, 0, 0, 0, 0, 0)
    assert add_sums([A, B]) == Sums(loss_sum=7.0, tokens=4, right=4, questions=6)
    assert add_sums([replace(A, pairs=2), B, replace(B, pairs=3)]).pairs == 5
    assert Sums(1, 2, 3, 4, 5, 6, 7, 8) + Sums(8, 7, 6, 5, 4, 3, 2, 1) == Sums(9, 9, 9, 9, 9, 9, 9, 9)


def test_means_say_what_they_are_over():
    assert means(A) == {"loss": 2.0, "tokens": 3, "score": 0.5, "questions": 2}
    assert means(NOTHING) == {"loss": None, "tokens": 0, "score": None, "questions": 0}
    assert means(Sums(questions=5))["score"] == 0.0


def test_all_clients_are_one():
    assert combine_clients({"a": A, "b": B}) == {
        "loss": 1.75,
        "tokens": 4,
        "score": pytest.approx(4 / 6),
        "questions": 6,
    }
    assert combine_clients({}) == means(NOTHING)


def test_the_server_s_own_questions_stand_in_for_the_clients():
    asked = Sums(right=9, questions=10, loss_sum=99.0, tokens=99)
    assert combine_clients({"a": A, "b": B}, asked) == {"loss": 1.75, "tokens": 4, "score": 0.9, "questions": 10}


def test_everywhere_is_the_mean_over_models_and_not_over_tokens():
    """a's model: 2.0 and 1/2; b's: 1.0 and 3/4. A client without tokens or questions does not count there."""
    assert mean_over_models({"a": A, "b": B}) == {"loss": 1.5, "tokens": 3, "score": 0.625, "questions": 4}
    assert mean_over_models({"a": A, "c": NOTHING}) == {"loss": 2.0, "tokens": 3, "score": 0.5, "questions": 2}
    assert mean_over_models({"c": NOTHING}) == mean_over_models({}) == means(NOTHING)


def test_preferences_are_means_over_pairs():
    one = Sums(pairs=2, preferred=1, margin_sum=3.0, preference_loss_sum=1.0)
    two = Sums(pairs=6, preferred=5, margin_sum=-1.0, preference_loss_sum=7.0)
    assert preference_means({"a": one, "b": two}) == {"loss": 1.0, "accuracy": 0.75, "margin": 0.25, "pairs": 8}
    assert preference_means({"a": A, "b": replace(one, pairs=0)}) is None
    assert preference_means({}) is None


def test_pooled_means():
    assert pooled_mean([(2.0, 1), (4.0, 3)]) == 1.5
    assert pooled_mean([(2.0, 0)]) is None
    assert pooled_mean([]) is None
