"""Splitters: every example once, in the same proportions everywhere, and the same again from the same seed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.common.errors import UserError
from fedloom.data import splitters
from fedloom.data.corpus import Corpus, Example
from fedloom.data.heterogeneity import heterogeneity
from fedloom.data.splitters import partition, select_questions, select_test_set, tabulate_split
from fedloom.recipe.recipe import SplitConfig

CATEGORIES = st.lists(st.sampled_from(["python", "c++", "sql", "a/b", "", "ü"]), min_size=1, max_size=120)
FRACTIONS = st.sampled_from([(0.0, 0.0), (0.05, 0.1), (0.3, 0.3), (0.0, 0.5), (0.45, 0.5)])


def corpus_of(categories, tasks=None, test=()) -> Corpus:
    tasks = tasks or [""] * len(categories)
    examples = tuple(
        Example(f"q{i}", "", "a", c, task=t) for i, (c, t) in enumerate(zip(categories, tasks, strict=True))
    )
    return Corpus("made-up", examples, "CC0-1.0", "a test", test=test)


def split_of(splitter, clients=None, **values) -> SplitConfig:
    return SplitConfig(splitter=splitter, num_clients=clients, **values)


def holds_each_example_once(parts, size) -> bool:
    return sorted(i for shard in parts.shards.values() for i in shard.indices) == list(range(size))


@given(CATEGORIES, st.data(), FRACTIONS, st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_every_example_is_held_exactly_once(categories, data, fractions, seed):
    splitter = data.draw(st.sampled_from(["uniform", "dirichlet", "meta"]))
    most = len({c or "unspecified" for c in categories}) if splitter == "meta" else len(categories)
    if splitter == "meta" and not any(categories):
        return
    clients = data.draw(st.integers(1, most))
    alpha = data.draw(st.sampled_from([1e-300, 1e-4, 0.1, 0.5, 1.0, 100.0, 1e308]))
    split = split_of(splitter, clients, alpha=alpha, validation=fractions[0], test=fractions[1])
    corpus = corpus_of(categories)
    parts = partition(corpus, split, seed)
    assert holds_each_example_once(parts, len(categories))
    assert len(parts.clients) == clients
    for shard in parts.shards.values():
        assert len(shard.train) >= 1
        if split.test > 0 and len(shard.indices) >= 2:
            assert len(shard.test) >= 1
        size = len(shard.indices)
        assert abs(len(shard.test) - size * split.test) <= 1 or len(shard.test) == size - 1
    assert partition(corpus, split, seed) == parts
    json.dumps(tabulate_split(corpus, parts))


@given(st.lists(st.sampled_from("abcd"), min_size=40, max_size=200), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_client_keeps_its_distribution_in_train_and_test(categories, seed):
    parts = partition(corpus_of(categories), split_of("uniform", 2, validation=0.2, test=0.2), seed)
    for shard in parts.shards.values():
        whole = Counter(categories[i] for i in shard.indices)
        for held in (shard.test, shard.validation):
            counts = Counter(categories[i] for i in held)
            for category, count in whole.items():
                assert abs(counts[category] - count * len(held) / len(shard.indices)) < 2


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_uniform_sizes_differ_by_at_most_one(size, data):
    clients = data.draw(st.integers(1, size))
    parts = splitters.uniform(["a"] * size, split_of("uniform", clients), np.random.default_rng(0))
    sizes = [len(part) for part in parts.values()]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == size
    assert list(parts) == sorted(parts), "names sort in their own order"


def test_small_alpha_is_skewed_and_large_alpha_is_even():
    corpus = corpus_of(["a", "b", "c", "d"] * 250)

    def largest_share(alpha: float) -> float:
        parts = partition(corpus, split_of("dirichlet", 4, alpha=alpha), 7)
        table = tabulate_split(corpus, parts)
        per_category = [[row["categories"].get(c, 0) for row in table["clients"]] for c in table["categories"]]
        return float(np.mean([max(counts) / sum(counts) for counts in per_category]))

    assert largest_share(0.01) > 0.9
    assert largest_share(1000.0) < 0.3


def test_dirichlet_proportions_have_the_mean_and_spread_of_their_distribution():
    alpha, clients = 0.7, 5
    rng = np.random.default_rng(3)
    drawn = np.array([splitters.draw_proportions(alpha, clients, rng) for _ in range(4000)])
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    assert np.allclose(drawn.mean(axis=0), mean, atol=4 * math.sqrt(variance / 4000))
    assert np.allclose(drawn.var(axis=0), variance, rtol=0.12)


@given(st.integers(1, 6), st.integers(2, 10), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_dirichlet_keeps_the_smallest_size(min_size, clients, seed):
    categories = ["rare"] + ["a", "b"] * 60
    split = split_of("dirichlet", clients, alpha=0.01, min_size=min_size, validation=0.1, test=0.2)
    parts = partition(corpus_of(categories), split, seed)
    assert holds_each_example_once(parts, len(categories))
    assert all(len(shard.train) >= min_size for shard in parts.shards.values())


def test_dirichlet_refuses_a_smallest_size_that_cannot_be():
    with pytest.raises(UserError, match=r"4 clients with split.min_size=5 need 20 examples, but there are 19: lower"):
        partition(corpus_of(["a"] * 19), split_of("dirichlet", 4, alpha=0.5, min_size=5, validation=0, test=0), 1)


def test_meta_names_clients_by_value():
    corpus = corpus_of(["b", "a", "b", "", "a", "b"])
    parts = partition(corpus, split_of("meta", validation=0, test=0), 1)
    assert {c: sorted(s.train) for c, s in parts.shards.items()} == {"a": [1, 4], "b": [0, 2, 5], "unspecified": [3]}


def test_meta_puts_values_together_in_balanced_clients():
    corpus = corpus_of(["python"] * 50 + ["java"] * 30 + ["sql"] * 25 + ["go"] * 10)
    parts = partition(corpus, split_of("meta", 2, validation=0, test=0), 1)
    assert {c: len(s.train) for c, s in parts.shards.items()} == {"go+python": 60, "java+sql": 55}


def test_client_names_are_short_different_and_fit_for_folders():
    names = splitters.name_clients([["a/b"], ["a_b"], ["A_B"], [".."], ["x" * 99], [f"language-{i}" for i in range(9)]])
    assert names == ["a_b", "a_b-2", "A_B-3", "_", "x" * 40, "language-0+8 others"]


def test_the_seed_changes_the_split_and_repeats_it():
    corpus = corpus_of(["a", "b", "c"] * 40)
    for split in (split_of("uniform", 3), split_of("dirichlet", 3, alpha=0.5), split_of("meta")):
        assert partition(corpus, split, 1) == partition(corpus, split, 1)
        assert partition(corpus, split, 1) != partition(corpus, split, 2)


def test_a_client_s_division_depends_on_nobody_else():
    categories = ["a", "b"] * 20
    split = split_of("meta")
    alone = splitters.divide(range(0, 40, 2), categories, split, "a", 5)
    assert partition(corpus_of(categories), split, 5).shards["a"] == alone
    assert splitters.divide(range(38, -1, -2), categories, split, "a", 5) == alone, (
        "the order of indices does not matter"
    )


HASH_SEED_SCRIPT = """
from fedloom.recipe.recipe import SplitConfig
from fedloom.data.splitters import partition, select_questions
from fedloom.data.corpus import Corpus, Example
words = ["python", "java", "sql", "go", "c"]
corpus = Corpus("x", tuple(Example(str(i), "", "a", words[i % 5]) for i in range(90)), "CC0-1.0", "a test")
for split in (SplitConfig(splitter="dirichlet", num_clients=4, alpha=0.3), SplitConfig(splitter="meta", num_clients=2)):
    parts = partition(corpus, split, 3)
    print(parts, select_questions(corpus, parts, 4, 3))
"""


def test_the_split_does_not_depend_on_the_hash_seed():
    def printed(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", HASH_SEED_SCRIPT]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert printed("1") == printed("2") != ""


@pytest.mark.parametrize(
    ("categories", "split", "sentence"),
    [
        (["a"] * 3, split_of("uniform", 4), r"split.num_clients=4 is more than the 3 examples: lower it"),
        (["a"] * 3, split_of("dirichlet", 4, alpha=1), r"split.num_clients=4 is more than the 3 examples"),
        (["a"] * 9, split_of("dirichlet", 2), r"dirichlet needs split.alpha: .* try split.alpha=0.5"),
        ([""] * 9, split_of("meta"), r"meta finds no value in the column 'category': set split.by .*splitter=uniform"),
        (["a", "b"] * 9, split_of("meta", 3), r"split.num_clients=3 is more than the 2 values of 'category'.*lower"),
        (
            ["a"] * 20 + ["b"],
            split_of("meta", min_size=2),
            r"client b would train on 1 examples, fewer than split.min_size=2",
        ),
        (
            ["a"] * 4,
            split_of("uniform", 2, min_size=3),
            r"client client-1 would train on 1 examples.*lower split.min_size or",
        ),
        (["a"] * 4, split_of("unifrom", 2), r"unknown splitter 'unifrom': did you mean uniform\?"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_mend(categories, split, sentence):
    with pytest.raises(UserError, match=sentence):
        partition(corpus_of(categories), split, 1)


@given(st.integers(0, 40), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_shares_add_up_and_are_within_one_of_the_exact_share(total, weights):
    counts = splitters.apportion(total, weights)
    if sum(weights) == 0:
        assert counts == [0] * len(weights)
        return
    assert sum(counts) == total
    assert all(abs(n - total * w / sum(weights)) < 1 for n, w in zip(counts, weights, strict=True))
    if total <= sum(weights):
        assert all(n <= w for n, w in zip(counts, weights, strict=True))


def test_split_table_counts_what_each_client_holds():
    corpus = corpus_of(["a"] * 20 + ["b"] * 10)
    table = tabulate_split(corpus, partition(corpus, split_of("meta", test=0.2, validation=0.1), 4))
    assert table == {
        "splitter": "meta",
        "seed": 4,
        "categories": ["a", "b"],
        "test_questions_trained_on": 0,
        "heterogeneity": heterogeneity([{"a": 20}, {"b": 10}]),
        "clients": [
            {"client": "a", "train": 14, "validation": 2, "test": 4, "categories": {"a": 20}},
            {"client": "b", "train": 7, "validation": 1, "test": 2, "categories": {"b": 10}},
        ],
    }


def test_questions_are_at_most_the_limit_for_each_task_and_even_over_clients():
    corpus = corpus_of(["x", "y"] * 60, tasks=["sum", "spell"] * 60)
    parts = partition(corpus, split_of("uniform", 3, test=0.5), 1)
    chosen = select_questions(corpus, parts, 6, 1)
    assert list(chosen) == list(parts.clients)
    for client, indices in chosen.items():
        assert set(indices) <= set(parts.shards[client].test) and list(indices) == sorted(set(indices))
    tasks = Counter((client, corpus.examples[i].task) for client, indices in chosen.items() for i in indices)
    assert set(tasks.values()) == {2}, "six questions of each task, two at each of three clients"
    assert select_questions(corpus, parts, 6, 1) == chosen != select_questions(corpus, parts, 6, 2)
    everything = select_questions(corpus, parts, None, 1)
    assert {c: list(i) for c, i in everything.items()} == {c: sorted(s.test) for c, s in parts.shards.items()}


def test_a_smaller_limit_asks_a_part_of_the_same_questions():
    corpus = corpus_of(["x"] * 90)
    parts = partition(corpus, split_of("uniform", 3, test=0.5), 1)
    few, more = (select_questions(corpus, parts, limit, 1) for limit in (4, 11))
    assert all(set(few[client]) <= set(more[client]) for client in parts.clients)
    assert sum(map(len, few.values())) == 4


def test_without_a_task_the_category_is_one_and_without_either_all_are_one():
    by_category = corpus_of(["x", "y"] * 20)
    parts = partition(by_category, split_of("uniform", 2, test=0.5), 1)
    assert sum(map(len, select_questions(by_category, parts, 3, 1).values())) == 6
    plain = corpus_of([""] * 40)
    assert sum(map(len, select_questions(plain, parts, 3, 1).values())) == 3


def test_the_corpus_s_own_test_set_is_limited_the_same_way():
    test = tuple(Example(f"t{i}", "", "a", task="gsm8k") for i in range(30))
    corpus = corpus_of(["a"] * 3, test=test)
    chosen = select_test_set(corpus, 5, 1)
    assert len(chosen) == 5 and chosen == select_test_set(corpus, 5, 1) != select_test_set(corpus, 5, 2)
    assert select_test_set(corpus, None, 1) == tuple(range(30))
    assert select_test_set(corpus_of(["a"]), 5, 1) == ()
