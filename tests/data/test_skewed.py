"""Clients that differ: nothing is lost, the skew is the one that was asked for, and its measure is right."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from fedloom.common.errors import UserError
from fedloom.data.clusters import clustered
from fedloom.data.corpus import Corpus, Example
from fedloom.data.heterogeneity import describe_difference, gini, heterogeneity, jensen_shannon
from fedloom.data.splitters import partition
from fedloom.recipe.recipe import SplitConfig

OWNERS = st.lists(st.sampled_from(["anna", "bert", "carl", "others", "", "ü"]), min_size=1, max_size=100)


def corpus_of(categories) -> Corpus:
    return Corpus("made-up", tuple(Example(f"q{i}", "", "a", c) for i, c in enumerate(categories)), "CC0-1.0", "a test")


def held(corpus, splitter, seed=0, **values):
    parts = partition(corpus, SplitConfig(splitter=splitter, **values), seed)
    assert sorted(i for shard in parts.shards.values() for i in shard.indices) == list(range(len(corpus.examples)))
    return {client: shard.indices for client, shard in parts.shards.items()}


@given(OWNERS, st.data(), st.integers(0, 2**32))
@settings(max_examples=120, deadline=None)
def test_nothing_is_lost_and_everybody_can_train(categories, data, seed):
    splitter = data.draw(st.sampled_from(["natural", "quantity", "shards"]))
    if splitter == "natural" and not any(categories):
        return
    most = {"natural": len({c or "unspecified" for c in categories}), "quantity": len(categories)}.get(splitter)
    clients = data.draw(st.integers(1, most or max(1, len(categories) // 2)))
    shards = 1 if len(categories) < 2 else 2
    alpha = data.draw(st.sampled_from([1e-300, 0.1, 1.0, 1e308]))
    corpus = corpus_of(categories)
    parts = held(corpus, splitter, seed, num_clients=clients, alpha=alpha, shards=shards)
    assert parts == held(corpus, splitter, seed, num_clients=clients, alpha=alpha, shards=shards)
    assert len(parts) == clients if splitter != "natural" else len(parts) <= clients


def test_quantity_has_the_sizes_of_its_distribution():
    """The shares of a symmetric Dirichlet have mean 1/n and variance (n−1)/(n²(nα+1))."""
    n, alpha, corpus = 4, 1.0, corpus_of(["x"] * 1000)
    split = {"num_clients": n, "alpha": alpha, "test": 0.0, "validation": 0.0}
    drawn = np.array([[len(part) / 1000 for part in held(corpus, "quantity", s, **split).values()] for s in range(400)])
    assert drawn.mean(axis=0) == pytest.approx([1 / n] * n, abs=0.04)
    assert drawn.var(axis=0) == pytest.approx([(n - 1) / (n**2 * (n * alpha + 1))] * n, rel=0.25)


def test_quantity_leaves_the_categories_even():
    corpus = corpus_of(["a", "b"] * 1000)
    for part in held(corpus, "quantity", num_clients=3, alpha=1.0).values():
        if len(part) > 200:
            share = Counter(corpus.examples[i].category for i in part)["a"] / len(part)
            assert share == pytest.approx(0.5, abs=0.12)


def test_shards_give_each_client_so_many_categories_and_the_same_size():
    corpus = corpus_of([c for c in "abcdefghij" for _ in range(20)])
    parts = held(corpus, "shards", num_clients=10, shards=2)
    assert {len(part) for part in parts.values()} == {20}
    kinds = [len({corpus.examples[i].category for i in part}) for part in parts.values()]
    assert max(kinds) <= 3 and 1.5 < np.mean(kinds) <= 2.0
    assert parts != held(corpus, "shards", 1, num_clients=10, shards=2)


def test_natural_keeps_owners_apart_and_puts_the_small_ones_together():
    corpus = corpus_of(["anna"] * 20 + ["bert"] * 15 + ["carl"] * 12 + ["dora"] + ["emil"] + ["others"] * 14)
    owners = {
        client: {corpus.examples[i].category for i in part}
        for client, part in held(corpus, "natural", min_size=4).items()
    }
    assert owners == {"anna": {"anna"}, "bert": {"bert"}, "carl": {"carl", "dora", "emil"}, "others": {"others"}}
    three = held(corpus, "natural", num_clients=3)
    assert {c: {corpus.examples[i].category for i in part} for c, part in three.items()} == {
        "anna": {"anna"}, "bert": {"bert"}, "others": {"carl", "dora", "emil", "others"}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("splitter", "categories", "values", "sentence"),
    [
        ("quantity", ["a"] * 9, {"num_clients": 2}, "quantity needs split.alpha"),
        ("shards", ["a"] * 5, {"num_clients": 3}, r"split\.shards=2 for 3 clients makes 6 shards, more than the 5"),
        ("natural", [""] * 5, {}, "finds no owner in the column 'category'"),
        ("natural", ["a", "b"], {"num_clients": 3}, r"split\.num_clients=3 is more than the 2 owners"),
    ],
)
def test_what_cannot_be_is_refused(splitter, categories, values, sentence):
    with pytest.raises(UserError, match=sentence):
        held(corpus_of(categories), splitter, **values)


# ------------------------------------------------------------------ categories from texts


def test_texts_that_use_the_same_words_are_one_group():
    pytest.importorskip("sklearn")
    topics = {
        "sea": ["whale", "harbour", "sailor", "anchor", "tide"],
        "oven": ["flour", "dough", "butter", "crust", "bake"],
        "law": ["judge", "verdict", "appeal", "lawyer", "court"],
    }
    rng = np.random.default_rng(0)
    rows = [
        (name, " ".join(rng.choice(words, 12)))
        for name, words in topics.items()
        for _ in range({"sea": 30}.get(name, 20))
    ]
    corpus = Corpus("made-up", tuple(Example(text, "", "a", "x") for _, text in rows), "CC0-1.0", "a test")
    found = clustered(corpus, 3, 7)
    groups = {}
    for (topic, _), example in zip(rows, found.examples, strict=True):
        groups.setdefault(example.category, set()).add(topic)
    assert groups["cluster-1"] == {"sea"}
    assert sorted(map(len, groups.values())) == [1, 1, 1]
    assert found.examples == clustered(corpus, 3, 7).examples
    with pytest.raises(UserError, match=r"split\.clusters=80 but there are 70 different texts|split\.clusters=80"):
        clustered(corpus, 80, 7)


# ------------------------------------------------------------------ how different


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8), st.data())
def test_the_distance_is_scipys(p, data):
    q = data.draw(st.lists(st.floats(0.01, 1), min_size=len(p), max_size=len(p)))
    p, q = np.array(p) / sum(p), np.array(q) / sum(q)
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2), abs=1e-7)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_gini_is_its_definition(sizes):
    total = sum(sizes)
    by_hand = sum(abs(a - b) for a in sizes for b in sizes) / (2 * len(sizes) * total) if total else 0.0
    assert gini(np.array(sizes, dtype=float)) == pytest.approx(by_hand, abs=1e-12)


def test_the_two_numbers_at_their_ends():
    assert heterogeneity([{"a": 5, "b": 5}, {"a": 5, "b": 5}]) == {"categories": 0.0, "sizes": 0.0}
    apart = heterogeneity([{"a": 10}, {"b": 10}])
    # each against (½, ½): ½·log2(1/¾) + ½·(½·log2(½/¾) + ½·log2(½/¼))
    by_hand = math.sqrt(0.5 * math.log2(4 / 3) + 0.5 * (0.5 * math.log2(2 / 3) + 0.5))
    assert apart["categories"] == pytest.approx(by_hand)
    assert heterogeneity([{"a": 3}, {"a": 9}]) == {"categories": None, "sizes": pytest.approx(0.25)}
    assert (
        describe_difference(apart)
        == f"how different clients are, 0 equal to 1: {by_hand:.2f} in categories, 0.00 in size"
    )
    assert describe_difference(None) == ""


def test_a_smaller_alpha_is_more_different():
    corpus = corpus_of(["a", "b", "c", "d"] * 100)
    found = []
    for alpha in (100.0, 1.0, 0.05):
        parts = held(corpus, "dirichlet", num_clients=4, alpha=alpha)
        counts = [dict(Counter(corpus.examples[i].category for i in part)) for part in parts.values()]
        found.append(heterogeneity(counts)["categories"])
    assert found == sorted(found)
    assert found[0] < 0.15
    assert found[2] > 0.4
