"""Casts: send floats in 16 bits and decode them to their own dtype.

bf16 has fp32's range and 8 significant bits; fp16 has 11 bits and ends at 65504. A cast that would turn a finite number
into an infinite one is refused; NaN and ±Inf pass unchanged, as do 16-bit floats.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedloom.messages.operators.base import (
    Around,
    CannotEncode,
    LossyOptions,
    Notes,
    Operator,
    check_no_notes,
    is_float,
)
from fedloom.messages.operators.flat import Part, Parts, Spec


class CastOptions(LossyOptions):
    dtype: Literal["bf16", "fp16"] = Field("bf16", description="the 16-bit float to send")


class Bf16Options(LossyOptions):
    dtype: Literal["bf16"] = Field("bf16", description="bfloat16")


class Fp16Options(LossyOptions):
    dtype: Literal["fp16"] = Field("fp16", description="IEEE half precision")


class Cast(Operator):
    lossless = False
    Options: ClassVar[type[LossyOptions]] = CastOptions

    @property
    def dtype(self) -> torch.dtype:
        assert isinstance(self.options, CastOptions | Bf16Options | Fp16Options)
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[self.options.dtype]

    def layout(self, spec: Spec, exact: bool = False) -> Spec:
        return {n: Part(self.dtype, p.count) if is_float(p) and p.dtype.itemsize > 2 else p for n, p in spec.items()}

    def encode(self, parts: Parts, around: Around) -> tuple[Parts, Notes]:
        return {n: self._narrow(t) for n, t in parts.items()}, {}

    def _narrow(self, values: torch.Tensor) -> torch.Tensor:
        if not values.is_floating_point() or values.element_size() <= 2:
            return values
        narrow = values.to(self.dtype)
        if not torch.equal(torch.isinf(narrow), torch.isinf(values)):
            most = torch.finfo(self.dtype).max
            raise CannotEncode(f"a number of the payload is over {most:g}, the largest of {self.dtype}: use bf16")
        return narrow

    def decode(self, parts: Parts, spec: Spec, notes: Notes, around: Around) -> Parts:
        check_no_notes(notes)
        return {n: parts[n].to(part.dtype) for n, part in spec.items()}

    def error(self, largest: float) -> float:
        info = torch.finfo(self.dtype)
        return largest * info.eps / 2 + info.tiny * info.eps / 2


class Bf16(Cast):
    """The cast by its everyday name."""

    Options: ClassVar[type[LossyOptions]] = Bf16Options


class Fp16(Cast):
    """The cast by its everyday name."""

    Options: ClassVar[type[LossyOptions]] = Fp16Options
