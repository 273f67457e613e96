"""A chain of operators: encode in the order that a recipe names, decode in reverse.

    payload ─ flat parts ─ operator 1 ─ … ─ operator n ─▶ parts, and a coding: {"operators", "table", "notes"}

The receiver knows the chain from its own recipe. Chain and table of names determine the layout of the parts after every
operator. A message is checked against that before memory is allocated. With error feedback the residual is what the
rest of the chain lost,

    r_t = (x_t + r_{t-1}) - decode(encode(x_t + r_{t-1})),    so    Σ decoded + r_T = Σ x      (arXiv 1901.09847)

The residual is stored by name, because a client may send other tensors in other rounds. This file does not know who
sends, or when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from fedloom.common import registry
from fedloom.common.complaints import parse_options
from fedloom.common.errors import UserError
from fedloom.messages import limits
from fedloom.messages.operators.base import Around, Operator, is_float
from fedloom.messages.operators.flat import BadPayload, Part, Parts, Spec, Table, check_parts, flatten, unflatten
from fedloom.messages.types import Payload

#: A client's residual of error feedback: name → what has not been sent yet. Changed in place.
Residual = dict[str, torch.Tensor]


class Chain:
    """Operators in order. `described` is their JSON with all options, as in messages."""

    def __init__(self, operators: Sequence[Operator] = (), described: Sequence[Mapping[str, Any]] = ()) -> None:
        self.operators = tuple(operators)
        self.described = [dict(d) for d in described]

    @classmethod
    def parse(cls, values: Sequence[str | Mapping[str, Any]], where: str = "operators") -> Chain:
        """Build a chain from a recipe's list; `where` is its key. Raises UserError for an invalid chain."""
        if len(values) > limits.OPERATORS:
            raise UserError(f"{where} has {len(values)} operators, but at most {limits.OPERATORS} may be chained")
        operators, described = [], []
        for value in values:
            given = {"name": value} if isinstance(value, str) else dict(value)
            name = str(given.pop("name", ""))
            operator = registry.operators.get(name)
            options = parse_options(operator.Options, given, name, where=f"{where}: ")
            operators.append(operator(options))
            described.append({"name": name, **options.model_dump(mode="json")})
        chain = cls(operators, described)
        chain._check_order(where)
        return chain

    def _check_order(self, where: str) -> None:
        """Raise UserError for an order in which an operator does nothing, or not what it says."""
        spec: Spec = {"F32": Part(torch.float32, 1000)}
        names = [d["name"] for d in self.described]
        first = True
        for i, operator in enumerate(self.operators):
            if operator.needs_reference and i:
                raise UserError(f"{where}: {names[i]} comes after {names[i - 1]}: put it first in the chain")
            if not operator.lossless and not any(is_float(part) for part in spec.values()):
                raise UserError(
                    f"{where}: {names[i]} comes after {names[i - 1]}, which leaves no floats: put it before"
                )
            if operator.error_feedback and not first:
                raise UserError(
                    f"{where}: error_feedback is set on {names[i]}, which is not the first lossy operator: set it on "
                    "the first one, which covers those after it"
                )
            first = first and operator.lossless
            spec = operator.layout(spec, self.lossless)

    @property
    def lossless(self) -> bool:
        return all(operator.lossless for operator in self.operators)

    @property
    def needs_reference(self) -> bool:
        return any(operator.needs_reference for operator in self.operators)

    @property
    def error_feedback(self) -> bool:
        return any(operator.error_feedback for operator in self.operators)

    def encode(
        self,
        payload: Payload,
        generator: torch.Generator | None = None,
        reference: Mapping[str, torch.Tensor] | None = None,
        residual: Residual | None = None,
    ) -> Payload:
        """Return the encoded payload, or the payload itself if the chain is empty. Raises CannotEncode.

        Args:
            payload: plain.
            generator: for stochastic rounding and random draws.
            reference: what both sides have, for `delta`.
            residual: the residual of error feedback; replaced by the new one.
        """
        if not self.operators:
            return payload
        table = Table.of(payload.tensors)
        around = Around(table, generator or torch.Generator().manual_seed(0), reference, self.lossless)
        parts, specs, notes = flatten(payload.tensors, table), [table.spec()], []
        corrected: tuple[int, Parts] | None = None
        for i, operator in enumerate(self.operators):
            if operator.error_feedback:
                corrected = i, _add_residual(parts, table, residual or {})
                parts = {n: corrected[1].get(n, t).to(t.dtype) for n, t in parts.items()}
            specs.append(operator.layout(specs[-1], self.lossless))
            parts, note = operator.encode(parts, around)
            check_parts(parts, specs[-1])
            notes.append(note)
        if corrected is not None and residual is not None:
            at, wanted = corrected
            back = self._decode_down_to(parts, specs, notes, replace(around, generator=None), at)
            _update_residual(residual, table, {n: t - back[n] for n, t in wanted.items()})
        return Payload(parts, payload.meta, {"operators": self.described, "table": table.to_json(), "notes": notes})

    def decode(
        self,
        payload: Payload,
        reference: Mapping[str, torch.Tensor] | None = None,
        max_bytes: int = limits.PAYLOAD_BYTES,
    ) -> Payload:
        """Return the plain payload. Raises BadPayload; allocates nothing larger than `max_bytes`."""
        coding = payload.coding
        if coding is None and not self.operators:
            return payload
        names = [d["name"] for d in self.described]
        if not isinstance(coding, dict) or coding.get("operators") != self.described:
            raise BadPayload(f"the payload is not encoded by the recipe's operators, {names}")
        notes = coding.get("notes")
        if not isinstance(notes, list) or [type(n) for n in notes] != [dict] * len(names):
            raise BadPayload("the notes do not have one mapping per operator")
        table = Table.from_json(coding.get("table"))
        if table.nbytes > max_bytes:
            raise BadPayload(f"the table claims {table.nbytes} bytes, but at most {max_bytes} are allowed")
        specs = [table.spec()]
        for operator in self.operators:
            specs.append(operator.layout(specs[-1], self.lossless))
        check_parts(payload.tensors, specs[-1])
        parts = self._decode_down_to(payload.tensors, specs, notes, Around(table, None, reference, self.lossless))
        return Payload(unflatten(parts, table), payload.meta)

    def _decode_down_to(
        self, parts: Parts, specs: Sequence[Spec], notes: Sequence[dict[str, Any]], around: Around, down_to: int = 0
    ) -> Parts:
        for i in reversed(range(down_to, len(self.operators))):
            parts = self.operators[i].decode(parts, specs[i], notes[i], around)
            check_parts(parts, specs[i])
        return parts


def _add_residual(parts: Parts, table: Table, residual: Residual) -> Parts:
    """Return x + r for every float part, in fp32 (fp64 for fp64), as new tensors."""
    made = {n: t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for n, t in parts.items() if _is_float(t)}
    for part, name, start, shape in table.places():
        kept = residual.get(name)
        if part in made and kept is not None and tuple(kept.shape) == shape:
            made[part][start : start + prod(shape)].view(shape).add_(kept)
    return made


def _update_residual(residual: Residual, table: Table, left: Parts) -> None:
    for part, name, start, shape in table.places():
        if part in left:
            residual[name] = left[part][start : start + prod(shape)].view(shape).clone()


def _is_float(values: torch.Tensor) -> bool:
    return is_float(Part(values.dtype, 0))
