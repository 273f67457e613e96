"""The nouns: what moves through fedloom, from an example to an update. Data only, no behaviour beyond checking itself.

This file does not know any model, algorithm or runtime; everything else may import it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fedloom import limits

JSON = str | bool | int | float | None | list["JSON"] | dict[str, "JSON"]


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


@dataclass
class Payload:
    """What a message carries: named tensors and a small JSON dict.

    Attributes:
        tensors: name → tensor of any shape and dtype that safetensors knows.
        meta: strings, booleans, integers and finite floats, nested in lists and dicts; 16 KB at most as JSON.
        coding: what operators made of it (operators/chain.py): the chain, the table of names, each operator's notes.
            `tensors` are flat parts then, and mean nothing until they are decoded. None for a plain payload.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    coding: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_metadata(self.meta)


def check_metadata(meta: Mapping[str, Any]) -> None:
    """Raise ValueError unless `meta` is JSON of at most 16 KB with finite numbers only."""

    def walk(value: Any, where: str, depth: int = 0) -> None:
        if depth > limits.METADATA_DEPTH:
            raise ValueError(f"payload metadata nests deeper than {limits.METADATA_DEPTH} levels")
        if isinstance(value, bool | int | str) or value is None:
            return
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"payload metadata {where} is {value}; only finite numbers travel")
            return
        if isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(item, f"{where}[{i}]", depth + 1)
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"payload metadata {where} has the key {key!r}; keys are strings")
                walk(item, f"{where}.{key}", depth + 1)
            return
        raise ValueError(f"payload metadata {where} is a {type(value).__name__}; tensors go into Payload.tensors")

    walk(meta, "meta")
    size = len(json.dumps(meta))
    if size > limits.METADATA_BYTES:
        raise ValueError(f"payload metadata has {size} bytes; at most {limits.METADATA_BYTES} travel")


#: What a client is asked to do. `train` and `evaluate` as named; `save` writes the client's own adapter to its folder.
Kind = Literal["train", "evaluate", "save"]


@dataclass(frozen=True)
class Assignment:
    """Server → client: one piece of work.

    Attributes:
        kind: train, evaluate or save.
        client: whom it is for.
        round: 1 for the first round; under `evaluate`, the number of rounds finished. A client starts from the newest
            state of its own that is older than this round (older or equal under `evaluate` and `save`). It is also the
            version of the model that training starts from: the one after round − 1 rounds. The outcome says it again.
        rounds: how many rounds the run has.
        payload: what the algorithm sends.
        steps: optimiser steps to take, or None where the client counts epochs.
        dataset: under `evaluate`, which data: the client's own ``test`` or ``validation``, or ``pooled``, all clients'
            test data together, which only a simulator has.
        score: under `evaluate`, whether questions are answered and scored besides the loss.
        recipe: the resolved recipe; present in the first assignment that a client gets in a run.
    """

    kind: Kind
    client: str
    round: int
    rounds: int
    payload: Payload
    steps: int | None = None
    dataset: Literal["test", "validation", "pooled"] = "test"
    score: bool = True
    recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Cost:
    """What a piece of work took. Bytes are those of encoded messages, counted by the runtime; the rest is measured.

    Attributes:
        upload_bytes: client → server.
        download_bytes: server → client.
        broadcast_bytes: those of `download_bytes` that were first messages to a client, which carry the recipe and the
            initial broadcast. The server counts them.
        train_tokens: tokens that went through forward and backward.
        train_flops: floating-point operations of training (evaluation/cost.py has the closed form).
        steps: optimiser steps.
        wall_seconds, cpu_seconds: of the work itself.
        gpu_seconds: how long it held CUDA devices, added up over them; 0 on a CPU.
    """

    upload_bytes: int = 0
    download_bytes: int = 0
    broadcast_bytes: int = 0
    train_tokens: int = 0
    train_flops: int = 0
    steps: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Update:
    """Client → server: the result of one assignment.

    Attributes:
        num_examples: the client's training examples, FedAvg's weight.
        num_tokens: supervised tokens among them, the weight by choice.
        metrics: sums and means as plain numbers; under `evaluate` sums only (loss_sum, tokens, right, questions).
    """

    client: str
    round: int
    payload: Payload
    num_examples: int = 0
    num_tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = Cost()


@dataclass(frozen=True)
class Failure:
    """A client that raised, vanished, was late or sent what cannot be used: a value, never an exception.

    Attributes:
        reason: a short code, such as ``non_finite``, ``bad_payload``, ``out_of_memory``.
        detail: a sentence for the log, without any of the client's data.
    """

    client: str
    round: int
    reason: str
    detail: str
    cost: Cost = Cost()


#: Reasons of a `Failure` after which the client's process knows nothing of the run: it is told everything again.
STARTED_ANEW = frozenset({"lost", "crashed", "late", "absent"})

#: The reason of a client whose simulated device was lost: it was sent nothing.
VANISHED = frozenset({"vanished"})

Outcome = Update | Failure


def pooled_mean(values: Sequence[tuple[float, float]]) -> float | None:
    """Σ sums / Σ counts over (sum, count) pairs; None where the counts add up to nothing."""
    count = sum(n for _, n in values)
    return sum(s for s, _ in values) / count if count else None
