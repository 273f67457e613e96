"""The data types that move through fedloom, from an assignment to an update: data that checks itself, nothing more.

This file does not know any model, algorithm or runtime; every other file may import it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fedloom.messages import limits
from fedloom.messages.names import under, without

JSON = str | bool | int | float | None | list["JSON"] | dict[str, "JSON"]


@dataclass
class Payload:
    """The content of a message: named tensors and a small JSON dict.

    Attributes:
        tensors: name → tensor of any shape and any dtype that safetensors knows.
        meta: strings, booleans, integers and finite floats, nested in lists and dicts; at most 16 KB as JSON.
        coding: how operators encoded it (messages/operators/chain.py): the chain, the table of names, each operator's
            notes. `tensors` are then flat parts without meaning until they are decoded. None for a plain payload.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    coding: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_metadata(self.meta)

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`, by their names without it (names.py)."""
        return under(self.tensors, prefix)

    def without(self, *prefixes: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with none of `prefixes`."""
        return without(self.tensors, *prefixes)


def check_metadata(meta: Mapping[str, Any]) -> None:
    """Raise ValueError unless `meta` is JSON of at most 16 KB with finite numbers only."""

    def walk(value: Any, where: str, depth: int = 0) -> None:
        if depth > limits.METADATA_DEPTH:
            raise ValueError(f"payload metadata is nested deeper than {limits.METADATA_DEPTH} levels")
        if isinstance(value, bool | int | str) or value is None:
            return
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"payload metadata {where} is {value}, but numbers must be finite")
            return
        if isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(item, f"{where}[{i}]", depth + 1)
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"payload metadata {where} has the key {key!r}, but keys must be strings")
                walk(item, f"{where}.{key}", depth + 1)
            return
        raise ValueError(f"payload metadata {where} is a {type(value).__name__}: put tensors into Payload.tensors")

    walk(meta, "meta")
    size = len(json.dumps(meta))
    if size > limits.METADATA_BYTES:
        raise ValueError(f"payload metadata has {size} bytes, but may have at most {limits.METADATA_BYTES}")


#: A client's task. `save` writes the client's own adapter to its folder.
Kind = Literal["train", "evaluate", "save"]


@dataclass(frozen=True)
class Assignment:
    """A piece of work that the server sends to a client.

    Attributes:
        kind: train, evaluate or save.
        client: the receiver.
        round: 1 for the first round; under `evaluate`, the number of finished rounds. A client starts from its own
            newest
            state that is older than this round (older or equal under `evaluate` and `save`). It is also the version of
            the
            model that training starts from: the one after round − 1 rounds. The outcome repeats it.
        rounds: number of rounds of the run.
        payload: what the algorithm sends.
        steps: optimiser steps to take, or None if the client counts epochs.
        dataset: under `evaluate`, which data: the client's own ``test`` or ``validation``, or ``pooled``: all clients'
            test data together, which only a simulator has.
        score: under `evaluate`, whether to answer and score questions, not only to compute the loss.
        recipe: the resolved recipe, in the first assignment that a client gets in a run.
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
    """The cost of a piece of work. The runtime counts the bytes of encoded messages; the rest is measured.

    Attributes:
        upload_bytes: client → server.
        download_bytes: server → client.
        broadcast_bytes: the part of `download_bytes` in first messages to a client, which have the recipe and the
            initial
            broadcast. The server counts them.
        train_tokens: tokens that went through forward and backward passes.
        train_flops: floating-point operations of training (training/flops.py has the closed form).
        steps: optimiser steps.
        wall_seconds, cpu_seconds: of the work itself.
        gpu_seconds: how long it used CUDA devices, summed over them; 0 on a CPU.
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
    """The result of one assignment, sent by a client to the server.

    Attributes:
        num_examples: the client's training examples, FedAvg's weight.
        num_tokens: supervised tokens among them, an alternative weight.
        metrics: sums and means as plain numbers; under `evaluate` only sums (loss_sum, tokens, right, questions).
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
    """A client that raised an error, vanished, was late or sent an unusable update: a value, never an exception.

    Attributes:
        reason: a short code, such as ``non_finite``, ``bad_payload``, ``out_of_memory``.
        detail: a sentence for the log, without any of the client's data.
    """

    client: str
    round: int
    reason: str
    detail: str
    cost: Cost = Cost()


#: What is wrong with a payload that operators encoded, where the recipe names none.
UNEXPECTED_CODING = "the payload is not encoded by the operators that the recipe names, []"


#: Reasons of a `Failure` after which the client's process has lost its state of the run: it gets everything again.
LOST_STATE = frozenset({"lost", "crashed", "late", "absent"})


#: Reason of a `Failure` whose simulated device was lost; the client was sent nothing.
VANISHED = frozenset({"vanished"})


Outcome = Update | Failure
