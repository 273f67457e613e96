"""The data types of a corpus: Example, Corpus, Shard, Partition."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One training or test example.

    Attributes:
        instruction: the task.
        input: further context, or the empty string.
        output: the answer to learn.
        rejected: under preference tuning, the answer that `output` is preferred to; empty elsewhere.
        category: the value that the `meta` and `dirichlet` splitters use (a skill, a language, a specialty).
        choices: the options of a multiple-choice question, in order; empty otherwise.
        task: the task whose verifier checks the answer; the category unless the corpus sets another.
        reference: JSON that the paired evaluation needs to verify an answer, such as a verifier's own entry.
    """

    instruction: str
    input: str
    output: str
    category: str = ""
    choices: tuple[str, ...] = ()
    task: str = ""
    reference: Mapping[str, Any] | None = None
    rejected: str = ""


#: `Corpus.source` of data that stay at the sites.
SITES = "the sites"


@dataclass(frozen=True)
class Corpus:
    """A named list of examples, with its licence and source.

    Attributes:
        name: the name in a recipe, such as ``fed-skills``.
        examples: those that are split among the clients.
        license: SPDX id or a sentence.
        source: where these rows came from (a path, a hub id with revision, a generator with version).
        suite: the name of the paired evaluation suite, or None if it has none that runs here.
        test: the corpus's own test set, scored by the paired evaluation; empty if the clients' test data are used.
        dropped: rows left out, by reason, such as ``{"empty_answer": 3}``.
    """

    name: str
    examples: tuple[Example, ...]
    license: str
    source: str
    suite: str | None = None
    test: tuple[Example, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)

    def digest(self) -> str:
        """Return the sha256 (hex) of all examples and the test set, in order; the key of the tokenised cache."""
        digest = hashlib.sha256()
        for group in (self.examples, self.test):
            digest.update(f"{len(group)}\n".encode())
            for e in group:
                row = [e.instruction, e.input, e.output, e.category, list(e.choices)]
                row += [e.rejected] if e.rejected else []
                digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()

    def categories(self) -> dict[str, int]:
        """Return category → number of examples, in alphabetical order."""
        counts: dict[str, int] = {}
        for e in self.examples:
            counts[e.category] = counts.get(e.category, 0) + 1
        return dict(sorted(counts.items()))


@dataclass(frozen=True)
class Shard:
    """One client's part of a corpus: disjoint indices into `Corpus.examples`."""

    train: tuple[int, ...] = ()
    validation: tuple[int, ...] = ()
    test: tuple[int, ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        return self.train + self.validation + self.test


@dataclass(frozen=True)
class Partition:
    """Client → example indices, reproducible from the seed. `clients` is in the order of tables."""

    shards: Mapping[str, Shard]
    splitter: str
    seed: int

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self.shards)

    @property
    def training_clients(self) -> tuple[str, ...]:
        """The clients with training data; under the `global` baseline only the pool."""
        return tuple(name for name, shard in self.shards.items() if shard.train)

    @property
    def testing_clients(self) -> tuple[str, ...]:
        return tuple(name for name, shard in self.shards.items() if shard.test)

    def pooled(self, name: str = "all-clients") -> Partition:
        """Return the `global` baseline's partition: an extra client has all training data; the others keep only their
        tests.

        The pool is in the corpus's order, so that it does not depend on the order of the clients.
        """
        train = tuple(sorted(i for shard in self.shards.values() for i in shard.train))
        validation = tuple(sorted(i for shard in self.shards.values() for i in shard.validation))
        shards = {client: Shard(test=shard.test) for client, shard in self.shards.items()}
        return Partition({**shards, name: Shard(train, validation, ())}, self.splitter, self.seed)
