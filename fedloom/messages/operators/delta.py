"""Delta: send the difference from the last broadcast, which both sides have.

The reference is what the client *decoded* in the assignment that it answers, so a lossy chain down shifts both sides
equally. A tensor whose name, dtype or shape is not in the broadcast is sent as it is. Before a lossy operator the
difference is that of the numbers, and integers stay as they are. In a chain of lossless operators it is the exclusive
or
of the bits, because (x - r) + r is not x in floating point. Near numbers share their leading bits, so it compresses as
well.
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch

from fedloom.messages.operators.base import Around, Notes, Operator, OperatorOptions, check_no_notes, is_float
from fedloom.messages.operators.flat import BadPayload, Part, Parts, Spec, bits


class DeltaOptions(OperatorOptions):
    """No options."""


class Delta(Operator):
    needs_reference: ClassVar[bool] = True
    Options: ClassVar[type[OperatorOptions]] = DeltaOptions

    def layout(self, spec: Spec, exact: bool = False) -> Spec:
        return {n: Part(torch.uint8, part.nbytes) for n, part in spec.items()} if exact else dict(spec)

    def encode(self, parts: Parts, around: Around) -> tuple[Parts, Notes]:
        made: Parts = {}
        for name, values in parts.items():
            if around.exact:
                made[name] = bits(values) ^ bits(self._reference(name, values.dtype, values.numel(), around))
            elif is_float(Part(values.dtype, 0)):
                made[name] = values - self._reference(name, values.dtype, values.numel(), around)
            else:
                made[name] = values
        return made, {}

    def decode(self, parts: Parts, spec: Spec, notes: Notes, around: Around) -> Parts:
        check_no_notes(notes)
        made: Parts = {}
        for name, part in spec.items():
            if around.exact:
                reference = self._reference(name, part.dtype, part.count, around)
                made[name] = (parts[name] ^ bits(reference)).view(part.dtype)
            elif is_float(part):
                made[name] = parts[name] + self._reference(name, part.dtype, part.count, around)
            else:
                made[name] = parts[name]
        return made

    def _reference(self, part: str, dtype: torch.dtype, count: int, around: Around) -> torch.Tensor:
        """Return the reference [count]; zero where the broadcast has no such tensor."""
        if around.reference is None:
            raise BadPayload("the difference has no broadcast to be added to")
        flat = torch.zeros(count, dtype=dtype)
        for own, name, start, shape in around.table.places():
            there = around.reference.get(name)
            if own == part and there is not None and there.dtype == dtype and tuple(there.shape) == shape:
                flat[start : start + prod(shape)].view(shape).copy_(there)
        return flat
