"""The nouns of data: Example, Corpus, Shard, Partition."""

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
        instruction: what is asked.
        input: further context, or the empty string.
        output: the answer that is trained on.
        rejected: under preference tuning, the answer that `output` is preferred to; empty elsewhere.
        category: what the `meta` and `dirichlet` splitters go by (a skill, a language, a specialty).
        choices: the options of a multiple-choice question, in order; empty otherwise.
        task: which task the answer is verified by; the category unless the corpus says otherwise.
        reference: whatever the paired evaluation needs to verify an answer (JSON), such as a verifier's own entry.
    """

    instruction: str
    input: str
    output: str
    category: str = ""
    choices: tuple[str, ...] = ()
    task: str = ""
    reference: Mapping[str, Any] | None = None
    rejected: str = ""


#: `Corpus.source` of data that stay where they are.
SITES = "the sites"


@dataclass(frozen=True)
class Corpus:
    """A named list of examples, with its licence and where it was found.

    Attributes:
        name: the name in a recipe, such as ``fed-skills``.
        examples: what is split among the clients.
        license: SPDX id or a sentence.
        source: where these rows came from (a path, a hub id with revision, a generator with version).
        suite: the name of the paired evaluation suite, or None where it has none that runs here.
        test: the corpus's own test set, scored by the paired evaluation; empty where the clients' test data is used.
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
        """sha256 (hex) over all examples and the test set, in order; the key of the tokenised cache."""
        digest = hashlib.sha256()
        for group in (self.examples, self.test):
            digest.update(f"{len(group)}\n".encode())
            for e in group:
                row = [e.instruction, e.input, e.output, e.category, list(e.choices)]
                row += [e.rejected] if e.rejected else []
                digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()

    def categories(self) -> dict[str, int]:
        """Category → number of examples, in alphabetical order."""
        counts: dict[str, int] = {}
        for e in self.examples:
            counts[e.category] = counts.get(e.category, 0) + 1
        return dict(sorted(counts.items()))


@dataclass(frozen=True)
class Shard:
    """One client's part of a corpus: indices into `Corpus.examples`, disjoint."""

    train: tuple[int, ...] = ()
    validation: tuple[int, ...] = ()
    test: tuple[int, ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        return self.train + self.validation + self.test


@dataclass(frozen=True)
class Partition:
    """Client → example indices, reproducible from the seed. `clients` is in the order that tables show."""

    shards: Mapping[str, Shard]
    splitter: str
    seed: int

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self.shards)

    @property
    def training_clients(self) -> tuple[str, ...]:
        """Those that hold training data (under the `global` baseline: the pool alone)."""
        return tuple(name for name, shard in self.shards.items() if shard.train)

    @property
    def testing_clients(self) -> tuple[str, ...]:
        return tuple(name for name, shard in self.shards.items() if shard.test)

    def pooled(self, name: str = "all-clients") -> Partition:
        """The `global` baseline's view: one extra client holds everybody's training data, each keeps its tests.

        The pool is in the corpus's order, so that it does not depend on the order of the clients.
        """
        train = tuple(sorted(i for shard in self.shards.values() for i in shard.train))
        validation = tuple(sorted(i for shard in self.shards.values() for i in shard.validation))
        shards = {client: Shard(test=shard.test) for client, shard in self.shards.items()}
        return Partition({**shards, name: Shard(train, validation, ())}, self.splitter, self.seed)
