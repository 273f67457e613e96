"""Split a corpus: categories → clients → train, validation and test, all reproducible from the seed.

A splitter only assigns example indices to clients. Each client's own share is then divided into train, validation and
test with every category in proportion, so all three have the client's distribution. No example is lost or used twice.
This file does not know where a corpus comes from, or what is trained on it.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from fedloom.common.errors import UserError
from fedloom.common.randomness import numpy_generator
from fedloom.common.registry import splitters
from fedloom.data.corpus import Corpus, Example, Partition, Shard
from fedloom.data.examples import question_of
from fedloom.data.heterogeneity import Heterogeneity, heterogeneity
from fedloom.recipe.recipe import SplitConfig

#: The name of a client whose category is the empty string.
UNSPECIFIED = "unspecified"


#: Client names become folder names; longer ones are shortened.
MAX_NAME = 40


def partition(corpus: Corpus, split: SplitConfig, seed: int) -> Partition:
    """Split a corpus among clients. `split` is resolved: it names its splitter.

    Returns:
        Client → train, validation and test indices into `corpus.examples`, each index exactly once.

    Raises:
        UserError: more clients than examples, a client that would train on fewer than `split.min_size` examples, or
            settings that the splitter refuses.
    """
    categories = [e.category for e in corpus.examples]
    name = split.splitter or "uniform"
    parts: dict[str, list[int]] = splitters.get(name)(categories, split, numpy_generator(seed, "split"))
    shards = {client: divide(indices, categories, split, client, seed) for client, indices in parts.items()}
    for client, shard in shards.items():
        if len(shard.train) < split.min_size:
            raise UserError(
                f"client {client} would train on {len(shard.train)} examples, fewer than split.min_size={split.min_size}: "
                "lower split.min_size or split.num_clients"
            )
    return Partition(shards, name, seed)


def uniform(categories: Sequence[str], split: SplitConfig, rng: np.random.Generator) -> dict[str, list[int]]:
    """Assign examples at random; sizes differ by at most one. Raises UserError with fewer examples than clients."""
    names = number_clients(split, len(categories))
    order = rng.permutation(len(categories))
    return {name: part.tolist() for name, part in zip(names, np.array_split(order, len(names)), strict=True)}


def dirichlet(categories: Sequence[str], split: SplitConfig, rng: np.random.Generator) -> dict[str, list[int]]:
    """Split each category in proportions drawn from Dir(α, …, α); small α gives skewed clients.

    Largest remainders turn proportions into integers, so nothing is lost. The draw is made once, so it always ends: a
    client
    with too little for `split.min_size` gets examples from the largest clients.

    Source: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", arXiv 1905.12022, section
        4.

    Raises:
        UserError: no alpha, or too few examples for `min_size` at every client.
    """
    names = number_clients(split, len(categories))
    if split.alpha is None:
        raise UserError("the splitter dirichlet needs split.alpha: small is skewed, large is even, try split.alpha=0.5")
    parts: list[list[int]] = [[] for _ in names]
    for category in sorted(set(categories)):
        members = rng.permutation([i for i, c in enumerate(categories) if c == category]).tolist()
        start = 0
        for part, count in zip(
            parts, apportion(len(members), draw_proportions(split.alpha, len(names), rng)), strict=True
        ):
            part += members[start : start + count]
            start += count
    top_up(parts, split, len(categories))
    return dict(zip(names, parts, strict=True))


def meta(categories: Sequence[str], split: SplitConfig, rng: np.random.Generator) -> dict[str, list[int]]:
    """Make one client per value, named by it; with fewer clients, put values together in clients of balanced size.

    Raises:
        UserError: no values in the column, or more clients than values.
    """
    members: dict[str, list[int]] = {}
    for i, category in enumerate(categories):
        members.setdefault(category or UNSPECIFIED, []).append(i)
    if not any(categories):
        raise UserError(
            f"the splitter meta finds no value in the column {split.by!r}: set split.by to a column that has some, "
            "or split.splitter=uniform"
        )
    count = split.num_clients or len(members)
    if count > len(members):
        raise UserError(
            f"split.num_clients={count} is more than the {len(members)} values of {split.by!r}, and meta gives each client "
            "whole values: lower split.num_clients, or take split.splitter=dirichlet"
        )
    # Largest value first into the smallest client: the largest client ends within 4/3 of the best (Graham 1969).
    clients: list[tuple[int, int, list[str]]] = [(0, k, []) for k in range(count)]
    for value in sorted(members, key=lambda v: (-len(members[v]), v)):
        size, k, values = heapq.heappop(clients)
        heapq.heappush(clients, (size + len(members[value]), k, [*values, value]))
    groups = sorted(sorted(values) for _, _, values in clients)
    names = name_clients(groups)
    return {name: [i for v in values for i in members[v]] for name, values in zip(names, groups, strict=True)}


def divide(indices: Sequence[int], categories: Sequence[str], split: SplitConfig, client: str, seed: int) -> Shard:
    """Divide one client's indices into train, validation and test: every category in proportion, each part in random
    order.

    The draw depends only on the seed and the client. At least one example is for training; with a test share and two
    examples
    or more, at least one is for the test.
    """
    rng = numpy_generator(seed, "split", 0, client)
    num_validation, num_test = count_held_out(len(indices), split)
    left: dict[str, list[int]] = {}
    for i in sorted(indices):
        left.setdefault(categories[i], []).append(i)
    left = {c: rng.permutation(left[c]).tolist() for c in sorted(left)}
    taken: list[list[int]] = []
    for wanted in (num_test, num_validation):
        counts = apportion(wanted, [len(members) for members in left.values()])
        taken.append([i for members, k in zip(left.values(), counts, strict=True) for i in members[:k]])
        left = {c: members[k:] for (c, members), k in zip(left.items(), counts, strict=True)}
    train = [i for members in left.values() for i in members]
    in_order = [tuple(rng.permutation(part).tolist()) if part else () for part in (train, taken[1], taken[0])]
    return Shard(train=in_order[0], validation=in_order[1], test=in_order[2])


def count_held_out(size: int, split: SplitConfig) -> tuple[int, int]:
    """Return how many of a client's `size` examples are for validation and for the test."""
    num_test = round(size * split.test)
    if split.test > 0 and size >= 2:
        num_test = max(num_test, 1)
    num_test = min(num_test, max(size - 1, 0))
    return min(round(size * split.validation), max(size - num_test - 1, 0)), num_test


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into integers in proportion to `weights`, by largest remainder; ties go to the first.

    If the weights are counts and `total` is at most their sum, no share exceeds its count.
    """
    whole = sum(weights)
    if total == 0 or whole <= 0:
        return [0] * len(weights)
    exact = [total * w / whole for w in weights]
    floors = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: (floors[k] - exact[k], k))
    for k in by_remainder[: total - sum(floors)]:
        floors[k] += 1
    return floors


def number_clients(split: SplitConfig, examples: int) -> list[str]:
    """Return client-1 … client-n, with leading zeros so that they sort.

    Raises UserError with fewer examples than clients.
    """
    count = split.num_clients or 1
    if count > examples:
        raise UserError(
            f"split.num_clients={count} is more than the {examples} examples: lower it, or raise data.limit"
        )
    width = len(str(count))
    return [f"client-{k:0{width}d}" for k in range(1, count + 1)]


def name_clients(groups: Iterable[Sequence[str]]) -> list[str]:
    """Return a name for each group of values: ``a+b``, shortened, unique and valid as a folder's name."""
    names: list[str] = []
    used: set[str] = set()
    for values in groups:
        name = "+".join(values)
        if len(name) > MAX_NAME and len(values) > 1:
            name = f"{values[0][: MAX_NAME - 12]}+{len(values) - 1} others"
        name = re.sub(r"[/\\:*?\"<>|\x00-\x1f]", "_", name)[:MAX_NAME].strip(". ") or "_"
        unique, k = name, 2
        while unique.casefold() in used:
            unique, k = f"{name}-{k}", k + 1
        used.add(unique.casefold())
        names.append(unique)
    return names


class SplitRow(TypedDict):
    """One client: its examples in each set, and category → its examples, all sets together."""

    client: str
    train: int
    validation: int
    test: int
    categories: dict[str, int]


class SplitTable(TypedDict):
    """The content of split.json, as docs/run-folder.md explains it. The last two are known where the data are here."""

    splitter: str
    seed: int
    categories: list[str]
    clients: list[SplitRow]
    heterogeneity: NotRequired[Heterogeneity]
    test_questions_trained_on: NotRequired[int]


def tabulate_split(corpus: Corpus, parts: Partition) -> SplitTable:
    """Count each client's examples by category."""
    rows: list[SplitRow] = []
    held: list[Mapping[str, int]] = []
    for client, shard in parts.shards.items():
        counts = Counter(corpus.examples[i].category for i in shard.indices)
        held.append(counts)
        rows.append(
            {
                "client": client,
                "train": len(shard.train),
                "validation": len(shard.validation),
                "test": len(shard.test),
                "categories": dict(sorted(counts.items())),
            }
        )
    trained = {question_of(corpus.examples[i]) for shard in parts.shards.values() for i in shard.train}
    asked = [question_of(corpus.examples[i]) for shard in parts.shards.values() for i in shard.test]
    return {
        "splitter": parts.splitter,
        "seed": parts.seed,
        "categories": list(corpus.categories()),
        "heterogeneity": heterogeneity(held),
        "test_questions_trained_on": sum(question in trained for question in asked),
        "clients": rows,
    }


def select_questions(corpus: Corpus, parts: Partition, limit: int | None, seed: int) -> dict[str, tuple[int, ...]]:
    """Select the test questions to score: at most `limit` per task over all clients, drawn evenly among them.

    Returns:
        Client → indices into `corpus.examples`, ascending; every client is there, some may have none.
    """
    shuffled = {
        client: numpy_generator(seed, "questions", 0, client).permutation(np.array(shard.test, dtype=int)).tolist()
        for client, shard in parts.shards.items()
    }
    return _draw_evenly(corpus.examples, shuffled, limit)


def select_test_set(corpus: Corpus, limit: int | None, seed: int) -> tuple[int, ...]:
    """Select questions of the corpus's own test set, at most `limit` per task: indices into `corpus.test`."""
    order = numpy_generator(seed, "questions").permutation(len(corpus.test)).tolist()
    return _draw_evenly(corpus.test, {"": order}, limit)[""]


def task_of(example: Example) -> str:
    """Return a question's task: its own, else its category; "" if it has neither."""
    return example.task or example.category


def _draw_evenly(
    examples: Sequence[Example], shuffled: Mapping[str, Sequence[int]], limit: int | None
) -> dict[str, tuple[int, ...]]:
    """Take one question per client in turn, each client in its own order, until a task has `limit`."""
    queues: dict[str, dict[str, list[int]]] = {}  # task → client → its questions
    for client, indices in shuffled.items():
        for i in indices:
            queues.setdefault(task_of(examples[i]), {}).setdefault(client, []).append(i)
    chosen: dict[str, list[int]] = {client: [] for client in shuffled}
    for by_client in queues.values():
        longest = max(len(questions) for questions in by_client.values())
        in_turn = [(c, q[turn]) for turn in range(longest) for c, q in by_client.items() if turn < len(q)]
        for client, i in in_turn if limit is None else in_turn[:limit]:
            chosen[client].append(i)
    return {client: tuple(sorted(indices)) for client, indices in chosen.items()}


def draw_proportions(alpha: float, count: int, rng: np.random.Generator) -> list[float]:
    """Draw once from Dir(α, …, α). If α is too extreme for floating point, use the limit: one client, or all equal."""
    drawn = rng.dirichlet(np.full(count, alpha))
    if np.isfinite(drawn).all() and drawn.sum() > 0:
        return [float(p) for p in drawn]
    if alpha >= 1:
        return [1.0] * count
    alone = int(rng.integers(count))
    return [1.0 if k == alone else 0.0 for k in range(count)]


def top_up(parts: list[list[int]], split: SplitConfig, examples: int) -> None:
    """Move examples from the largest clients until each has enough to train on `min_size`. Raises UserError."""
    need = min_examples(split)
    if need * len(parts) > examples:
        raise UserError(
            f"{len(parts)} clients with split.min_size={split.min_size} need {need * len(parts)} examples, but there are "
            f"{examples}: lower split.min_size or split.num_clients"
        )
    largest = [(-len(part), k) for k, part in enumerate(parts)]
    heapq.heapify(largest)
    for part in parts:
        while len(part) < need:
            size, k = heapq.heappop(largest)
            if -size != len(parts[k]):  # its size changed when it was topped up itself
                heapq.heappush(largest, (-len(parts[k]), k))
                continue
            part.append(parts[k].pop())
            heapq.heappush(largest, (-len(parts[k]), k))


def min_examples(split: SplitConfig) -> int:
    """Return the smallest number of examples that leaves a client `min_size` for training, after rounding."""
    bound = math.ceil((split.min_size + 3) / (1 - split.validation - split.test)) + 3
    short = [n for n in range(bound + 1) if n - sum(count_held_out(n, split)) < split.min_size]
    return short[-1] + 1
