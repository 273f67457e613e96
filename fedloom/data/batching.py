"""Choose the examples of a client's next steps, and collate a few sequences into one batch.

A client reads an endless stream: its examples in a random order, then in another, and so on. Each pass has one order,
seeded by the pass and the client. Round r reads its own stretch of the stream. So nothing has to be stored between
rounds, and a resumed run continues where it stopped. This file does not know the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedloom.common.randomness import numpy_generator
from fedloom.data.tokenization import TokenSequence


@dataclass(frozen=True)
class Plan:
    """The number of examples per forward pass and per step, and the length of a round.

    Exactly one of `steps` and `epochs` is set. With steps, batches run across the ends of passes; with epochs, the last
    batch and the last step of a pass are smaller.

    Attributes:
        batch_size: examples per forward pass.
        accumulation: forward passes per optimiser step.
        steps: optimiser steps per round.
        epochs: passes over the client's examples per round.
    """

    batch_size: int
    accumulation: int = 1
    steps: int | None = None
    epochs: int | None = None

    def steps_per_round(self, num_examples: int) -> int:
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * -(-num_examples // (self.batch_size * self.accumulation))


def round_indices(examples: Sequence[int], plan: Plan, round: int, seed: int, client: str) -> Iterator[list[list[int]]]:
    """Yield, for each optimiser step of this round (1-based), its forward passes as lists of example indices."""
    count = plan.batch_size * plan.accumulation
    if plan.steps is not None:
        start = (round - 1) * plan.steps * count
        stream = _read_stream(examples, start, plan.steps * count, seed, client)
        for step in range(plan.steps):
            yield _chunks(stream[step * count : (step + 1) * count], plan.batch_size)
        return
    assert plan.epochs is not None
    for epoch in range((round - 1) * plan.epochs, round * plan.epochs):
        order = _shuffle(examples, epoch, seed, client)
        for start in range(0, len(order), count):
            yield _chunks(order[start : start + count], plan.batch_size)


def _shuffle(examples: Sequence[int], epoch: int, seed: int, client: str) -> list[int]:
    permutation = numpy_generator(seed, "batches", epoch, client).permutation(len(examples))
    return [examples[i] for i in permutation]


def _read_stream(examples: Sequence[int], start: int, length: int, seed: int, client: str) -> list[int]:
    epoch, offset = divmod(start, len(examples))
    out: list[int] = []
    while len(out) < offset + length:
        out += _shuffle(examples, epoch, seed, client)
        epoch += 1
    return out[offset : offset + length]


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@dataclass(frozen=True)
class Batch:
    """A few sequences for one forward pass, either packed into one row or padded into several rows.

    Legend: T tokens in all, N sequences, L the longest, S supervised positions.

    Attributes:
        ids: [1, T] packed, [N, L] padded.
        positions: [1, T] position ids if packed, restarted at every sequence; None if padded: `mask` has them.
        lengths: the N sequence lengths.
        mask: [N, L] of 0 and 1 if padded, None if packed.
        where: [S], index into the flattened ids of the position *before* each supervised token, which has its logits.
        labels: [S], the supervised tokens.
        owners: [S], the index of each label's sequence, 0 to N − 1.
        examples: indices of the N examples, for error messages.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    lengths: tuple[int, ...]
    mask: torch.Tensor | None
    where: torch.Tensor
    labels: torch.Tensor
    owners: torch.Tensor
    examples: tuple[int, ...]

    @property
    def packed(self) -> bool:
        return self.mask is None

    @property
    def tokens(self) -> int:
        """The number of real tokens, without padding."""
        return sum(self.lengths)

    @property
    def units(self) -> int:
        """The number of units that a step's loss is the mean over: supervised tokens."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Pairs(Batch):
    """A batch of preference pairs: sequences 2i and 2i + 1 have the same prompt, and the first answer is preferred.

    Attributes:
        reference: [N] float32, each sequence's log-probability under the reference model.
        beta: β of the loss.
        smoothing: the share of pairs that are assumed to be labelled the wrong way round.
    """

    reference: torch.Tensor
    beta: float
    smoothing: float

    @property
    def units(self) -> int:
        """The number of units that a step's loss is the mean over: pairs."""
        return len(self.lengths) // 2


def collate(sequences: Sequence[TokenSequence], *, packed: bool, pad: int, examples: Sequence[int] = ()) -> Batch:
    """Collate sequences into a batch. A sequence's first token is never a label: nothing precedes it.

    Args:
        packed: one row of segments; otherwise padded rows.
        pad: id of the padding token.
        examples: indices of the sequences' examples, for error messages.
    """
    lengths = tuple(len(s) for s in sequences)
    stride = 0 if packed else max(lengths)
    where, labels, owners = [], [], []
    offset = 0
    for row, sequence in enumerate(sequences):
        first = max(sequence.prompt, 1)
        at = np.arange(first - 1, len(sequence) - 1)
        where.append(at + (offset if packed else row * stride))
        labels.append(sequence.ids[first:])
        owners.append(np.full(len(at), row))
        offset += len(sequence)
    if packed:
        ids = torch.from_numpy(np.concatenate([s.ids for s in sequences]).astype(np.int64))[None]
        positions, mask = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None], None
    else:
        ids = torch.full((len(sequences), stride), pad, dtype=torch.int64)
        mask = torch.zeros((len(sequences), stride), dtype=torch.int64)
        positions = None
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence.ids.astype(np.int64))
            mask[row, : len(sequence)] = 1
    flat = [torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (where, labels, owners)]
    return Batch(ids, positions, lengths, mask, flat[0], flat[1], flat[2], tuple(examples))
