"""A payload as flat buffers, one for each dtype, and a table of names and shapes.

    {"a.weight": fp32 [2, 3], "b": fp32 [4], "seeds": int64 [5]}  ⇄  F32 [10], I64 [5]
                                                                      {"F32": [["a.weight", [2, 3]], ["b", [4]]],
                                                                       "I64": [["seeds", [5]]]}

One buffer instead of hundreds of small tensors: an operator is a single pass, and scales and indices are paid for once.
Tensors lie in sorted name order without gaps, so the table gives no offsets and none can be wrong. This file does not
know operators, nor how any of it travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from fedloom.messages import limits

#: safetensors' name of a dtype → torch's.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


NAMES = {dtype: name for name, dtype in DTYPES.items()}


#: The dtypes that lossy operators act on. All others pass them unchanged.
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class BadPayload(ValueError):
    """An encoded payload that cannot be decoded; the message says why in one sentence, without its data."""


@dataclass(frozen=True)
class Part:
    """What a flat part is like: [count] of a dtype; where it is a bound, at most that many."""

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
    """Dtype → (name, shape) in sorted name order, dtypes sorted as well."""

    rows: Mapping[str, tuple[tuple[str, tuple[int, ...]], ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Table:
        rows: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for name in sorted(tensors):
            tensor = tensors[name]
            if tensor.dtype not in NAMES:
                raise ValueError(f"{name} has dtype {tensor.dtype}, which does not travel")
            rows.setdefault(NAMES[tensor.dtype], []).append((name, tuple(tensor.shape)))
        return cls({dtype: tuple(rows[dtype]) for dtype in sorted(rows)})

    def spec(self) -> Spec:
        """The flat parts that it describes."""
        return {d: Part(DTYPES[d], sum(prod(shape) for _, shape in rows)) for d, rows in self.rows.items()}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.spec().values())

    def places(self) -> Iterator[tuple[str, str, int, tuple[int, ...]]]:
        """(part, name, first element, shape) of every tensor."""
        for dtype, rows in self.rows.items():
            start = 0
            for name, shape in rows:
                yield dtype, name, start, shape
                start += prod(shape)

    def to_json(self) -> dict[str, Any]:
        return {dtype: [[name, list(shape)] for name, shape in rows] for dtype, rows in self.rows.items()}

    @classmethod
    def from_json(cls, values: object) -> Table:
        """A table from outside. Raises BadPayload; nothing is allocated by what it claims."""
        if not isinstance(values, dict) or not all(isinstance(rows, list) for rows in values.values()):
            raise BadPayload("the table of names is no mapping of dtypes to lists")
        if sum(len(rows) for rows in values.values()) > limits.TENSORS:
            raise BadPayload(f"the table names more than {limits.TENSORS} tensors")
        seen: set[str] = set()
        rows = {str(dtype): tuple(_row(dtype, row, seen) for row in values[dtype]) for dtype in values}
        if list(rows) != sorted(rows) or any([n for n, _ in r] != sorted(n for n, _ in r) for r in rows.values()):
            raise BadPayload("the table of names is not in sorted order")
        table = cls(rows)
        if table.nbytes > limits.PAYLOAD_BYTES:
            raise BadPayload(f"the table claims {table.nbytes} bytes; at most {limits.PAYLOAD_BYTES} are taken")
        return table


def _row(dtype: object, row: object, seen: set[str]) -> tuple[str, tuple[int, ...]]:
    if dtype not in DTYPES:
        raise BadPayload(f"the table has the dtype {str(dtype)[:20]!r}, which is not known")
    if type(row) is not list or [type(x) for x in row] != [str, list] or len(row[0]) > limits.NAME_CHARACTERS:
        raise BadPayload("a row of the table is not [name, shape]")
    name, shape = row
    if name in seen:
        raise BadPayload(f"the table names {name[:80]!r} twice")
    seen.add(name)
    if len(shape) > limits.DIMENSIONS or not all(type(n) is int and 0 <= n <= limits.PAYLOAD_BYTES for n in shape):
        raise BadPayload(f"the shape of {name[:80]!r} is not made of at most {limits.DIMENSIONS} sizes from 0 up")
    if prod(shape) > limits.PAYLOAD_BYTES or (0 in shape and prod(n for n in shape if n) > limits.PAYLOAD_BYTES):
        raise BadPayload(f"the shape of {name[:80]!r} is larger than any payload may be")
    return name, tuple(shape)


def flatten(tensors: Mapping[str, torch.Tensor], table: Table) -> Parts:
    """One new flat part for each dtype, on the CPU."""
    parts = {name: torch.empty(part.count, dtype=part.dtype) for name, part in table.spec().items()}
    for part, name, start, shape in table.places():
        parts[part][start : start + prod(shape)].view(shape).copy_(tensors[name].detach())
    return parts


def unflatten(parts: Mapping[str, torch.Tensor], table: Table) -> dict[str, torch.Tensor]:
    """Name → tensor in sorted name order, each with memory of its own: where it begins in a buffer would show in sums."""
    made = {n: parts[p][start : start + prod(shape)].view(shape).clone() for p, n, start, shape in table.places()}
    return dict(sorted(made.items()))


def check(parts: Mapping[str, torch.Tensor], spec: Spec) -> None:
    """Raise BadPayload unless the parts are what the table and the chain say that they must be."""
    if set(parts) != set(spec):
        raise BadPayload(f"the parts are {sorted(parts)[:8]} where the chain makes {sorted(spec)[:8]}")
    for name, part in spec.items():
        got = parts[name]
        fits = got.numel() <= part.count if part.bound else got.numel() == part.count
        if got.dtype != part.dtype or got.dim() != 1 or not fits:
            most = "at most " if part.bound else ""
            raise BadPayload(
                f"part {name} holds {got.numel()} of {NAMES.get(got.dtype)} where the chain makes {most}{part.count} "
                f"of {NAMES[part.dtype]}"
            )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """[bytes]: a window into a tensor that is contiguous and on the CPU, else of a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() < 2:  # torch takes any stride of so few elements for contiguous, and then refuses to view them
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The same as Python's bytes."""
    window: Any = bits(tensor).numpy()
    return memoryview(window)
