"""A chain of operators: encoded in the order that a recipe names, decoded in reverse.

    payload ─ flat parts ─ operator 1 ─ … ─ operator n ─▶ parts, and a coding: {"operators", "table", "notes"}

The receiver knows the chain from its own recipe. From it and the table of names follows what the parts must look like after
every operator, so that a message is measured against that before anything is allocated. With error feedback the residual is
what the whole rest of the chain lost,

    r_t = (x_t + r_{t-1}) - decode(encode(x_t + r_{t-1})),    so    Σ decoded + r_T = Σ x      (arXiv 1901.09847)

kept by name, because what a client sends may differ from round to round. This file does not know who sends, nor when.
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
from fedloom.messages.operators.flat import BadPayload, Part, Parts, Spec, Table, check, flatten, unflatten
from fedloom.messages.types import Payload

#: What a client keeps for error feedback: name → what has not been sent yet. Changed in place.
Residual = dict[str, torch.Tensor]


class Chain:
    """Operators in a row. `described` is their JSON with all options, as it stands in messages."""

    def __init__(self, operators: Sequence[Operator] = (), described: Sequence[Mapping[str, Any]] = ()) -> None:
        self.operators = tuple(operators)
        self.described = [dict(d) for d in described]

    @classmethod
    def parse(cls, values: Sequence[str | Mapping[str, Any]], where: str = "operators") -> Chain:
        """A chain from a recipe's list; `where` is its key. Raises UserError for what cannot be."""
        if len(values) > limits.OPERATORS:
            raise UserError(f"{where} has {len(values)} operators: at most {limits.OPERATORS} make a chain")
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
        """Refuse what would silently do nothing, or not what it says."""
        spec: Spec = {"F32": Part(torch.float32, 1000)}
        names = [d["name"] for d in self.described]
        first = True
        for i, operator in enumerate(self.operators):
            if operator.needs_reference and i:
                raise UserError(f"{where}: {names[i]} stands after {names[i - 1]}: put it first in the chain")
            if not operator.lossless and not any(is_float(part) for part in spec.values()):
                raise UserError(
                    f"{where}: {names[i]} stands after {names[i - 1]}, which leaves no floats: put it before"
                )
            if operator.error_feedback and not first:
                raise UserError(
                    f"{where}: error_feedback stands on {names[i]}, which is not the first lossy operator: set it on the "
                    "first one, it covers those after it"
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
        """The payload as it travels; the payload itself where the chain is empty. Raises CannotEncode.

        Args:
            generator: for stochastic rounding and random draws.
            reference: what both sides hold, for `delta`.
            residual: what error feedback kept; replaced by what it keeps now.
        """
        if not self.operators:
            return payload
        table = Table.of(payload.tensors)
        around = Around(table, generator or torch.Generator().manual_seed(0), reference, self.lossless)
        parts, specs, notes = flatten(payload.tensors, table), [table.spec()], []
        corrected: tuple[int, Parts] | None = None
        for i, operator in enumerate(self.operators):
            if operator.error_feedback:
                corrected = i, _with_residual(parts, table, residual or {})
                parts = {n: corrected[1].get(n, t).to(t.dtype) for n, t in parts.items()}
            specs.append(operator.layout(specs[-1], self.lossless))
            parts, note = operator.encode(parts, around)
            check(parts, specs[-1])
            notes.append(note)
        if corrected is not None and residual is not None:
            at, wanted = corrected
            back = self._undone(parts, specs, notes, replace(around, generator=None), at)
            _keep(residual, table, {n: t - back[n] for n, t in wanted.items()})
        return Payload(parts, payload.meta, {"operators": self.described, "table": table.to_json(), "notes": notes})

    def decode(
        self,
        payload: Payload,
        reference: Mapping[str, torch.Tensor] | None = None,
        max_bytes: int = limits.PAYLOAD_BYTES,
    ) -> Payload:
        """The plain payload. Raises BadPayload; nothing larger than `max_bytes` is allocated."""
        coding = payload.coding
        if coding is None and not self.operators:
            return payload
        names = [d["name"] for d in self.described]
        if not isinstance(coding, dict) or coding.get("operators") != self.described:
            raise BadPayload(f"the payload is not encoded by the operators that the recipe names, {names}")
        notes = coding.get("notes")
        if not isinstance(notes, list) or [type(n) for n in notes] != [dict] * len(names):
            raise BadPayload("the operators' notes are not one mapping for each")
        table = Table.from_json(coding.get("table"))
        if table.nbytes > max_bytes:
            raise BadPayload(f"the table claims {table.nbytes} bytes; at most {max_bytes} are taken")
        specs = [table.spec()]
        for operator in self.operators:
            specs.append(operator.layout(specs[-1], self.lossless))
        check(payload.tensors, specs[-1])
        parts = self._undone(payload.tensors, specs, notes, Around(table, None, reference, self.lossless))
        return Payload(unflatten(parts, table), payload.meta)

    def _undone(
        self, parts: Parts, specs: Sequence[Spec], notes: Sequence[dict[str, Any]], around: Around, down_to: int = 0
    ) -> Parts:
        for i in reversed(range(down_to, len(self.operators))):
            parts = self.operators[i].decode(parts, specs[i], notes[i], around)
            check(parts, specs[i])
        return parts


def _with_residual(parts: Parts, table: Table, residual: Residual) -> Parts:
    """x + r of every float part, in fp32 (fp64 for fp64), as a new tensor."""
    made = {n: t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for n, t in parts.items() if _float(t)}
    for part, name, start, shape in table.places():
        kept = residual.get(name)
        if part in made and kept is not None and tuple(kept.shape) == shape:
            made[part][start : start + prod(shape)].view(shape).add_(kept)
    return made


def _keep(residual: Residual, table: Table, left: Parts) -> None:
    for part, name, start, shape in table.places():
        if part in left:
            residual[name] = left[part][start : start + prod(shape)].view(shape).clone()


def _float(values: torch.Tensor) -> bool:
    return is_float(Part(values.dtype, 0))
