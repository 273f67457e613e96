"""Sparsification: send only some elements of every flat float part; the others decode to zero.

top_k keeps the ⌈fraction·n⌉ elements that are largest in size, the first of equal ones. Their indices are sent as one
byte each (the gap to the previous one; 255 means "255 and more"), or as one bit for each of the n elements where that
is
smaller. random_k draws the elements, and sends only the seed. Zero is a good guess for a difference but not for a
weight,
so in a recipe `delta` comes before it (channel.py).

Top-k with error feedback: arXiv 1809.07599 (Mem-SGD). Non-finite numbers are refused.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from fedloom.messages.operators.base import (
    Around,
    LossyOptions,
    Notes,
    Operator,
    check_finite,
    check_no_notes,
    is_float,
)
from fedloom.messages.operators.flat import BadPayload, Part, Parts, Spec

#: A gap of this size or more needs another byte.
ESCAPE = 255


class SparsifyOptions(LossyOptions):
    method: Literal["top_k", "random_k"] = Field("top_k", description="the largest, or drawn at random")
    fraction: float = Field(0.1, gt=0, le=1, description="share of the elements that is sent")
    rescale: bool = Field(False, description="random_k: multiply by n/k, so that the mean is right")

    @model_validator(mode="after")
    def _check_rescale(self) -> SparsifyOptions:
        if self.rescale and (self.method != "random_k" or self.error_feedback):
            raise ValueError("rescale=true needs method=random_k without error_feedback: leave it out")
        return self


class Sparsify(Operator):
    lossless = False
    for_differences = True
    Options: ClassVar[type[LossyOptions]] = SparsifyOptions
    options: SparsifyOptions

    def count_kept(self, count: int) -> int:
        """Return how many of `count` elements are sent."""
        return min(count, math.ceil(self.options.fraction * count))

    def _as_bits(self, count: int) -> bool:
        """Return whether one bit per element is smaller than one byte per kept element."""
        return 8 * self.count_kept(count) >= count

    def layout(self, spec: Spec, exact: bool = False) -> Spec:
        made: Spec = {}
        for name, part in spec.items():
            if not is_float(part):
                made[name] = part
                continue
            made[f"{name}.values"] = Part(part.dtype, self.count_kept(part.count))
            if self.options.method == "top_k" and self._as_bits(part.count):
                made[f"{name}.index"] = Part(torch.uint8, -(-part.count // 8))
            elif self.options.method == "top_k":
                made[f"{name}.index"] = Part(
                    torch.uint8, self.count_kept(part.count) + part.count // ESCAPE, bound=True
                )
        return made

    def encode(self, parts: Parts, around: Around) -> tuple[Parts, Notes]:
        made: Parts = {}
        notes: Notes = {}
        if self.options.method == "random_k":
            assert around.generator is not None
            notes = {"seed": int(torch.randint(0, 2**53, (), generator=around.generator))}
        for name, values in parts.items():
            if not is_float(Part(values.dtype, 0)):
                made[name] = values
                continue
            check_finite(values, "sparsify")
            count = values.numel()
            if self.options.method == "random_k":
                where = self._draw(notes["seed"], name, count)
                share = count / max(1, len(where)) if self.options.rescale else 1.0
                made[f"{name}.values"] = check_finite(values[where] * share, "sparsify with rescale")
            else:
                where = largest(values, self.count_kept(count))
                made[f"{name}.values"] = values[where]
                made[f"{name}.index"] = to_bits(where, count) if self._as_bits(count) else to_gaps(where)
        return made, notes

    def _draw(self, seed: int, name: str, count: int) -> torch.Tensor:
        """Return the ascending indices of the elements to send: numpy's PCG64 of (seed, the part's name as bytes)."""
        generator = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
        return torch.from_numpy(np.sort(generator.choice(count, self.count_kept(count), replace=False, shuffle=False)))

    def decode(self, parts: Parts, spec: Spec, notes: Notes, around: Around) -> Parts:
        if self.options.method == "random_k":
            if set(notes) != {"seed"} or type(notes["seed"]) is not int or not 0 <= notes["seed"] < 2**53:
                raise BadPayload("the notes of sparsify are not one seed")
        else:
            check_no_notes(notes)
        made: Parts = {}
        for name, part in spec.items():
            if not is_float(part):
                made[name] = parts[name]
                continue
            kept = self.count_kept(part.count)
            if self.options.method == "random_k":
                where = self._draw(notes["seed"], name, part.count)
            elif self._as_bits(part.count):
                where = from_bits(parts[f"{name}.index"], kept, part.count)
            else:
                where = from_gaps(parts[f"{name}.index"], kept, part.count)
            made[name] = torch.zeros(part.count, dtype=part.dtype)
            made[name][where] = parts[f"{name}.values"]
        return made

    def error(self, largest: float) -> float:
        return largest * (max(1.0, 1 / self.options.fraction - 1) if self.options.rescale else 1.0)


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ascending indices of the `count` largest elements in size, the first of equal ones."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    size = values.abs()
    least = torch.topk(size, count, sorted=False).values.min()
    over = size > least
    ties = torch.nonzero(size == least).flatten()[: count - int(over.sum())]
    over[ties] = True
    return torch.nonzero(over).flatten()


def to_bits(where: torch.Tensor, count: int) -> torch.Tensor:
    """Encode indices as one bit per element, the first in the lowest bit of the first byte."""
    mask = np.zeros(count, dtype=bool)
    mask[where.numpy()] = True
    return torch.from_numpy(np.packbits(mask, bitorder="little"))


def from_bits(packed: torch.Tensor, kept: int, count: int) -> torch.Tensor:
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    where = np.nonzero(bits)[0]
    if len(where) != kept or (kept and where[-1] >= count):
        raise BadPayload(f"the index marks {len(where)} elements of {count}, but {kept} are sent")
    return torch.from_numpy(where)


def to_gaps(where: torch.Tensor) -> torch.Tensor:
    """Encode indices as bytes: the elements skipped before each; 255 stands for 255 of them with more to come."""
    places = where.numpy()
    gaps = np.diff(places, prepend=-1) - 1
    more, last = gaps // ESCAPE, gaps % ESCAPE
    coded = np.full(len(gaps) + int(more.sum()), ESCAPE, dtype=np.uint8)
    coded[np.cumsum(more + 1) - 1] = last
    return torch.from_numpy(coded)


def from_gaps(coded: torch.Tensor, kept: int, count: int) -> torch.Tensor:
    """Decode gaps to indices. They ascend by construction, so only the last can be out of range."""
    gaps = coded.numpy()
    ends = np.nonzero(gaps != ESCAPE)[0]
    if len(ends) != kept or (len(gaps) and gaps[-1] == ESCAPE):
        raise BadPayload(f"the index names {len(ends)} elements, but {kept} are sent")
    where = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(kept)
    if kept and where[-1] >= count:
        raise BadPayload(f"the index names element {where[-1]}, but there are only {count}")
    return torch.from_numpy(where)
