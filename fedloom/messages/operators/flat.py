"""Flatten a payload: one flat buffer per dtype, and a table of names and shapes.

    {"a.weight": fp32 [2, 3], "b": fp32 [4], "seeds": int64 [5]}  ⇄  F32 [10], I64 [5]
                                                                      {"F32": [["a.weight", [2, 3]], ["b", [4]]],
                                                                       "I64": [["seeds", [5]]]}

With one buffer instead of hundreds of small tensors an operator is a single pass, and has scales and indices once.
Tensors are in sorted name order without gaps, so the table needs no offsets, and none can be wrong. This file does not
know operators, or how anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from fedloom.messages import limits

#: safetensors' name of a dtype → torch's dtype.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


NAMES = {dtype: name for name, dtype in DTYPES.items()}


#: The dtypes that lossy operators change. All others pass them unchanged.
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class BadPayload(ValueError):
    """An encoded payload that cannot be decoded; the message says why, without any of its data."""


@dataclass(frozen=True)
class Part:
    """The layout of a flat part: `count` elements of a dtype, or at most `count` if it is a bound."""

    dtype: torch.dtype
    count: int
    bound: bool = False

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


Parts = dict[str, torch.Tensor]


Spec = dict[str, Part]


@dataclass(frozen=True)
class Table:
    """The table of names: dtype → (name, shape), in sorted order of names and of dtypes."""

    rows: Mapping[str, tuple[tuple[str, tuple[int, ...]], ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Table:
        rows: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for name in sorted(tensors):
            tensor = tensors[name]
            if tensor.dtype not in NAMES:
                raise ValueError(f"{name} has the dtype {tensor.dtype}, which messages do not support")
            rows.setdefault(NAMES[tensor.dtype], []).append((name, tuple(tensor.shape)))
        return cls({dtype: tuple(rows[dtype]) for dtype in sorted(rows)})

    def spec(self) -> Spec:
        """Return the layout of the flat parts."""
        return {d: Part(DTYPES[d], sum(prod(shape) for _, shape in rows)) for d, rows in self.rows.items()}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.spec().values())

    def places(self) -> Iterator[tuple[str, str, int, tuple[int, ...]]]:
        """Yield (part, name, first element, shape) of every tensor."""
        for dtype, rows in self.rows.items():
            start = 0
            for name, shape in rows:
                yield dtype, name, start, shape
                start += prod(shape)

    def to_json(self) -> dict[str, Any]:
        return {dtype: [[name, list(shape)] for name, shape in rows] for dtype, rows in self.rows.items()}

    @classmethod
    def from_json(cls, values: object) -> Table:
        """Read a table from outside. Raises BadPayload; allocates nothing of the size that the table claims."""
        if not isinstance(values, dict) or not all(isinstance(rows, list) for rows in values.values()):
            raise BadPayload("the table of names is no mapping of dtypes to lists")
        if sum(len(rows) for rows in values.values()) > limits.TENSORS:
            raise BadPayload(f"the table names more than {limits.TENSORS} tensors")
        seen: set[str] = set()
        rows = {str(dtype): tuple(_parse_row(dtype, row, seen) for row in values[dtype]) for dtype in values}
        if list(rows) != sorted(rows) or any([n for n, _ in r] != sorted(n for n, _ in r) for r in rows.values()):
            raise BadPayload("the table of names is not in sorted order")
        table = cls(rows)
        if table.nbytes > limits.PAYLOAD_BYTES:
            raise BadPayload(f"the table claims {table.nbytes} bytes, but at most {limits.PAYLOAD_BYTES} are allowed")
        return table


def _parse_row(dtype: object, row: object, seen: set[str]) -> tuple[str, tuple[int, ...]]:
    if dtype not in DTYPES:
        raise BadPayload(f"the table has the unknown dtype {str(dtype)[:20]!r}")
    if type(row) is not list or [type(x) for x in row] != [str, list] or len(row[0]) > limits.NAME_CHARACTERS:
        raise BadPayload("a row of the table is not [name, shape]")
    name, shape = row
    if name in seen:
        raise BadPayload(f"the table names {name[:80]!r} twice")
    seen.add(name)
    if len(shape) > limits.DIMENSIONS or not all(type(n) is int and 0 <= n <= limits.PAYLOAD_BYTES for n in shape):
        raise BadPayload(f"the shape of {name[:80]!r} must have at most {limits.DIMENSIONS} sizes, each 0 or more")
    if prod(shape) > limits.PAYLOAD_BYTES or (0 in shape and prod(n for n in shape if n) > limits.PAYLOAD_BYTES):
        raise BadPayload(f"the shape of {name[:80]!r} is larger than the largest payload")
    return name, tuple(shape)


def flatten(tensors: Mapping[str, torch.Tensor], table: Table) -> Parts:
    """Return one new flat part per dtype, on the CPU."""
    parts = {name: torch.empty(part.count, dtype=part.dtype) for name, part in table.spec().items()}
    for part, name, start, shape in table.places():
        parts[part][start : start + prod(shape)].view(shape).copy_(tensors[name].detach())
    return parts


def unflatten(parts: Mapping[str, torch.Tensor], table: Table) -> dict[str, torch.Tensor]:
    """Return name → tensor in sorted order.

    Each has its own memory, since sums depend on where a tensor starts in a buffer.
    """
    made = {n: parts[p][start : start + prod(shape)].view(shape).clone() for p, n, start, shape in table.places()}
    return dict(sorted(made.items()))


def check_parts(parts: Mapping[str, torch.Tensor], spec: Spec) -> None:
    """Raise BadPayload unless the parts have the layout that table and chain require."""
    if set(parts) != set(spec):
        raise BadPayload(f"the payload has the parts {sorted(parts)[:8]}, but the chain gives {sorted(spec)[:8]}")
    for name, part in spec.items():
        got = parts[name]
        fits = got.numel() <= part.count if part.bound else got.numel() == part.count
        if got.dtype != part.dtype or got.dim() != 1 or not fits:
            most = "at most " if part.bound else ""
            raise BadPayload(
                f"part {name} has {got.numel()} of {NAMES.get(got.dtype)}, but the chain gives {most}{part.count} "
                f"of {NAMES[part.dtype]}"
            )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes [bytes]: a window if it is contiguous and on the CPU, else a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() < 2:  # torch calls any stride of so few elements contiguous, and then refuses to view them
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the same as a memoryview."""
    window: Any = bits(tensor).numpy()
    return memoryview(window)
