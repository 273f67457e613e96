"""Block quantisation: 256 neighbours of the flat buffer share one scale, and each becomes a small integer.

    bits      levels                       scale s of a block with largest |x| = m       size of a value
    8         -127 … 127                   m/127                                         8 bits
    4         -7 … 7                       m/7                                           4 bits, two per byte
    2         -2, -1, 0, 1                 -x/2 of the x with |x| = m, so that it is -2   2 bits, four per byte
    ternary   -1, 0, 1                     nearest: see below; stochastic: m             1.6 bits, five per byte

A scale is sent as bf16, rounded away from zero so that no value is over the last level: half the bytes of fp32, and at
most 1/128 more error. Nearest rounding has an error of at most s/2 (bits 2: |s|, on the side with one level less).
Stochastic rounding is floor(x/s + u) with u uniform in [0, 1): its error is below s, and its mean is right (QSGD, arXiv
1610.02132; with three levels TernGrad, arXiv 1705.07878). Ternary nearest keeps values over 0.7 of the block's mean
|x|,
with their mean as the scale, which is close to the least squared error (Ternary Weight Networks, arXiv 1605.04711).

Non-finite numbers are refused. This file does not know tensors' names: a block may reach over two tensors.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from fedloom.messages.operators.base import (
    Around,
    CannotEncode,
    LossyOptions,
    Notes,
    Operator,
    check_finite,
    check_no_notes,
    is_float,
)
from fedloom.messages.operators.flat import BadPayload, Part, Parts, Spec

Bits = Literal[8, 4, 2, "ternary"]


#: Values per byte, the lowest and the highest level.
PACKING: dict[Bits, tuple[int, int, int]] = {8: (1, -127, 127), 4: (2, -7, 7), 2: (4, -2, 1), "ternary": (5, -1, 1)}


class QuantizeOptions(LossyOptions):
    bits: Bits = Field(8, description="8, 4, 2 or ternary (1.6 bits)")
    block: int = Field(256, ge=8, le=65536, description="neighbours that share a scale")
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="nearest errs least, stochastic is right in the mean"
    )

    @model_validator(mode="after")
    def _check_rounding(self) -> QuantizeOptions:
        if self.bits == 2 and self.rounding == "stochastic":
            raise ValueError("bits=2 has one level less on one side, so it rounds to the nearest: use bits=ternary")
        return self


class Quantize(Operator):
    lossless = False
    Options: ClassVar[type[LossyOptions]] = QuantizeOptions
    options: QuantizeOptions

    def layout(self, spec: Spec, exact: bool = False) -> Spec:
        made: Spec = {}
        for name, part in spec.items():
            if is_float(part):
                made[f"{name}.codes"] = Part(torch.uint8, -(-part.count // PACKING[self.options.bits][0]))
                made[f"{name}.scales"] = Part(torch.int16, -(-part.count // self.options.block))
            else:
                made[name] = part
        return made

    def encode(self, parts: Parts, around: Around) -> tuple[Parts, Notes]:
        made: Parts = {}
        for name, values in parts.items():
            if is_float(Part(values.dtype, 0)):
                assert around.generator is not None
                made[f"{name}.codes"], made[f"{name}.scales"] = self._encode(values, around.generator)
            else:
                made[name] = values
        return made, {}

    def _encode(self, values: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise values [n]: return codes [bytes] and scales [blocks] as bits of bf16."""
        if values.dtype == torch.float64 and bool((values.abs() > torch.finfo(torch.float32).max).any()):
            raise CannotEncode("quantize works in fp32, but a float64 number of the payload is over its range")
        values = check_finite(values.float(), "quantize")
        count, block = values.numel(), self.options.block
        rest = -count % block
        blocks = (torch.nn.functional.pad(values, (0, rest)) if rest else values).view((count + rest) // block, block)
        scales = _round_up(self._scales(blocks, rest))
        levels = blocks / torch.where(scales == 0, 1.0, scales)[:, None]
        if self.options.rounding == "stochastic":
            levels.add_(torch.rand(levels.shape, generator=generator)).floor_()
        else:
            levels.round_()
        each, low, high = PACKING[self.options.bits]
        codes = levels.clamp_(low, high).sub_(low).to(torch.uint8).view(-1)[:count]
        return _pack(codes, each), scales.bfloat16().view(torch.int16)

    def _scales(self, blocks: torch.Tensor, rest: int) -> torch.Tensor:
        """Return the scales [blocks], fp32, of [blocks, block].

        The last `rest` values of the last block are padding.
        """
        size = blocks.abs()
        if self.options.bits == 2:
            if not len(blocks):
                return blocks.new_zeros(0)
            return blocks.gather(1, size.argmax(1, keepdim=True)).squeeze(1) / -2
        if self.options.bits == "ternary" and self.options.rounding == "nearest":
            there = torch.full((len(blocks),), self.options.block)
            if rest:
                there[-1] -= rest
            kept = size > 0.7 * (size.double().sum(1) / there)[:, None]
            mean = torch.where(kept, size, 0.0).double().sum(1) / kept.sum(1).clamp(min=1)
            return mean.float()
        return (size.amax(1) if len(blocks) else blocks.new_zeros(0)) / PACKING[self.options.bits][2]

    def decode(self, parts: Parts, spec: Spec, notes: Notes, around: Around) -> Parts:
        check_no_notes(notes)
        return {
            n: self._decode(parts[f"{n}.codes"], parts[f"{n}.scales"], part) if is_float(part) else parts[n]
            for n, part in spec.items()
        }

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, part: Part) -> torch.Tensor:
        sizes = scales.view(torch.bfloat16).float()
        if not bool(torch.isfinite(sizes).all()) or (self.options.bits != 2 and bool((sizes < 0).any())):
            raise BadPayload("a scale of a quantised block is not finite, or below 0")
        each, low, high = PACKING[self.options.bits]
        levels = _unpack(codes, each)[: part.count]
        if levels.numel() and int(levels.max()) > high - low:
            raise BadPayload(f"a quantised value is over the highest level of bits={self.options.bits}")
        values = levels.float().add_(low)
        whole = part.count // self.options.block * self.options.block
        blocks = whole // self.options.block
        values[:whole].view(blocks, self.options.block).mul_(sizes[:blocks, None])
        if whole < part.count:
            values[whole:].mul_(sizes[-1])
        most = min(torch.finfo(part.dtype).max, torch.finfo(torch.float32).max)
        return values.clamp_(-most, most).to(part.dtype)  # m rounded up may be over the dtype's largest number

    def error(self, largest: float) -> float:
        _, _, high = PACKING[self.options.bits]
        step = largest * (1 + 2**-7) / (2 if self.options.bits == 2 else high) + 2.0**-133
        whole = self.options.rounding == "stochastic" or self.options.bits in {2, "ternary"}
        return (step if whole else step / 2) * (1 + 1e-6)


def _round_up(scales: torch.Tensor) -> torch.Tensor:
    """Round fp32 to the nearest bf16 away from zero, still in fp32: add just under one unit, cut the lower 16 bits."""
    up = ((scales.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
    return torch.where(torch.isinf(up), scales.sign() * torch.finfo(torch.bfloat16).max, up)


def _pack(codes: torch.Tensor, each: int) -> torch.Tensor:
    """Pack small integers, `each` per byte, the first in the lowest place."""
    if each == 1:
        return codes
    base = {2: 16, 4: 4, 5: 3}[each]
    rest = -codes.numel() % each
    places = (torch.nn.functional.pad(codes, (0, rest)) if rest else codes).view((codes.numel() + rest) // each, each)
    packed = places[:, 0].clone()
    for place in range(1, each):
        packed += places[:, place] * base**place
    return packed


def _unpack(packed: torch.Tensor, each: int) -> torch.Tensor:
    if each == 1:
        return packed
    base = {2: 16, 4: 4, 5: 3}[each]
    places = torch.empty(packed.numel(), each, dtype=torch.uint8)
    left = packed
    for place in range(each):
        places[:, place] = left % base if place < each - 1 else left  # too large a rest is refused later, as a level
        left = left // base
    return places.view(-1)
