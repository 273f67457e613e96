"""Encode and decode messages: a JSON header, flat tensors as safetensors, a digest. No message can carry code.

    "FLM2" | header length, uint32 LE | header, UTF-8 JSON | body, safetensors | sha256 of all before it, 32 bytes

docs/wire-format.md is precise enough for a second implementation. A message is sent in chunks of bounded size, straight
from the tensors' memory; the digest is computed on the way and comes last. A reader checks every size before it
allocates
memory. This file does not know who sends, what the tensors mean, or how operators are decoded.

A message that never leaves its process needs no digest. With `sealed=False` its last 32 bytes are zeros, and every
reader
that checks the digest refuses it (docs/adr/0006-unsealed-messages.md).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from itertools import chain
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch

from fedloom.messages import limits
from fedloom.messages.operators.flat import DTYPES, NAMES, BadPayload, Table, check_parts, raw_bytes
from fedloom.messages.types import Assignment, Cost, Failure, Outcome, Payload, Update, check_metadata

MAGIC = b"FLM2"


VERSION = 2


DIGEST_BYTES = 32


#: torch's tensors start at multiples of this many bytes.
ALIGNMENT = 64


Rows = tuple[tuple[str, tuple[int, ...]], ...]


class WireError(ValueError):
    """A message that cannot be read: truncated, altered, too large or of another version."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """An encoded message: its size in bytes, and its bytes in chunks of at most `limits.CHUNK_BYTES`.

    The chunks are windows into the payload's own memory, which must not change before they are read. Read them once.
    """

    total: int
    chunks: Iterator[memoryview]

    def join(self) -> bytes:
        """Return the message in one piece. This is the only copy of the tensors."""
        return b"".join(self.chunks)


class Split(NamedTuple):
    """A message in three pieces. Equal payloads have equal bodies; `body` may be in shared memory."""

    start: bytes
    body: memoryview
    digest: bytes

    @property
    def total(self) -> int:
        return len(self.start) + len(self.body) + len(self.digest)


def split(message: bytes | bytearray | memoryview) -> Split:
    """Split a message; the body is a window into it. Raises WireError for an impossible header length."""
    if len(message) < 8 or message[:4] != MAGIC:
        raise WireError("this is no fedloom message, or a message of another version")
    (length,) = struct.unpack("<I", message[4:8])
    if length > limits.HEADER_BYTES or 8 + length + DIGEST_BYTES > len(message):
        raise WireError(f"the header claims {length} bytes, more than the message has or a header may have")
    body = memoryview(message)[8 + length : -DIGEST_BYTES]
    return Split(bytes(message[: 8 + length]), body, bytes(message[-DIGEST_BYTES:]))


def stream_assignment(assignment: Assignment, sealed: bool = True) -> Stream:
    fields = {f.name: getattr(assignment, f.name) for f in dataclasses.fields(assignment) if f.name != "payload"}
    return _stream({"message": "assignment", "fields": fields}, assignment.payload, sealed)


def encode_assignment(assignment: Assignment, *, sealed: bool = True) -> bytes:
    return stream_assignment(assignment, sealed).join()


def decode_assignment(
    message: bytes | bytearray | memoryview | Split, max_bytes: int | None = None, *, sealed: bool = True
) -> Assignment:
    header, payload = _unpack(message, ("assignment",), max_bytes, sealed)
    return _build(Assignment, header.get("fields"), payload=payload)


def stream_outcome(outcome: Outcome, sealed: bool = True) -> Stream:
    fields = {
        f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome) if f.name not in {"payload", "cost"}
    }
    if isinstance(outcome, Update):
        fields["metrics"] = dict(outcome.metrics)
    header = {
        "message": "update" if isinstance(outcome, Update) else "failure",
        "fields": fields,
        "cost": dataclasses.asdict(outcome.cost),
    }
    return _stream(header, outcome.payload if isinstance(outcome, Update) else Payload(), sealed)


def encode_outcome(outcome: Outcome, *, sealed: bool = True) -> bytes:
    return stream_outcome(outcome, sealed).join()


def decode_outcome(
    message: bytes | bytearray | memoryview | Split, max_bytes: int | None = None, *, sealed: bool = True
) -> Outcome:
    header, payload = _unpack(message, ("update", "failure"), max_bytes, sealed)
    cost = _build(Cost, header.get("cost"))
    if header["message"] == "update":
        return _build(Update, header.get("fields"), payload=payload, cost=cost)
    return _build(Failure, header.get("fields"), cost=cost)


# ------------------------------------------------------------------ encoding


def _stream(header: dict[str, Any], payload: Payload, sealed: bool) -> Stream:
    coding = payload.coding
    if coding is None:
        table = Table.of(payload.tensors)
        pieces = [payload.tensors[name] for _, name, _, _ in table.places()]
        spec = {n: (NAMES[part.dtype], part.count) for n, part in table.spec().items()}
        coding = {"operators": [], "table": table.to_json(), "notes": []}
    else:
        pieces = [payload.tensors[name] for name in sorted(payload.tensors)]
        spec = {n: (NAMES[payload.tensors[n].dtype], payload.tensors[n].numel()) for n in sorted(payload.tensors)}
    head = _body_head(spec)
    size = len(head) + sum(count * DTYPES[dtype].itemsize for dtype, count in spec.values())
    text = json.dumps(
        {"version": VERSION, **header, "meta": payload.meta, **coding, "body": {"bytes": size}, "digest": "sha256"},
        allow_nan=False,
        separators=(",", ":"),
    ).encode()
    if len(text) > limits.HEADER_BYTES:
        raise WireError(f"the header has {len(text)} bytes, but may have at most {limits.HEADER_BYTES}")
    start = MAGIC + struct.pack("<I", len(text)) + text + head
    return Stream(len(start) - len(head) + size + DIGEST_BYTES, _chunks(start, pieces, sealed))


def _body_head(spec: Mapping[str, tuple[str, int]]) -> bytes:
    """Return safetensors' own header: a length, then names, dtypes, shapes and offsets without gaps."""
    entries: dict[str, Any] = {}
    at = 0
    for name, (dtype, count) in spec.items():
        end = at + count * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": [count], "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _chunks(start: bytes, tensors: list[torch.Tensor], sealed: bool) -> Iterator[memoryview]:
    digest = hashlib.sha256()
    for data in chain([memoryview(start)], map(raw_bytes, tensors)):
        for at in range(0, len(data), limits.CHUNK_BYTES):
            chunk = data[at : at + limits.CHUNK_BYTES]
            if sealed:
                digest.update(chunk)
            yield chunk
    yield memoryview(digest.digest() if sealed else bytes(DIGEST_BYTES))


# ------------------------------------------------------------------ decoding


def _unpack(
    message: bytes | bytearray | memoryview | Split, kinds: tuple[str, ...], max_bytes: int | None, sealed: bool
) -> tuple[dict[str, Any], Payload]:
    total = message.total if isinstance(message, Split) else len(message)
    if max_bytes is not None and total > max_bytes:
        raise WireError(f"the message has {total} bytes, but may have at most {max_bytes}")
    start, body, digest = message if isinstance(message, Split) else split(message)
    if sealed:
        told = hashlib.sha256(start)
        told.update(body)
        if told.digest() != digest:
            raise WireError("the message does not match its digest: it was truncated or altered")
    try:
        header = json.loads(start[8:], parse_constant=_reject_constant)
        if header["version"] != VERSION:
            raise WireError(f"the message has version {header['version']!r}; this is version {VERSION}")
        if header["message"] not in kinds:
            raise WireError(f"the message has the kind {header['message']!r}, expected {' or '.join(kinds)}")
        if len(body) != header["body"]["bytes"]:
            raise WireError(f"the body has {len(body)} bytes, but its header says otherwise")
        if not isinstance(header["meta"], dict):
            raise WireError("the metadata is no mapping")
        _check_metadata(header["meta"])
        return header, _payload(header, _parts(body))
    except WireError:
        raise
    except BadPayload as error:
        raise WireError(str(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"the message cannot be read: {type(error).__name__}") from error


def _check_metadata(meta: dict[str, Any]) -> None:
    try:
        check_metadata(meta)
    except ValueError as error:
        raise WireError(str(error)) from error


def _parts(body: memoryview) -> dict[str, tuple[torch.dtype, int, memoryview]]:
    """Read the flat parts: name → (dtype, elements, bytes), as windows into the message. Raises WireError."""
    if len(body) < 8:
        raise WireError("the body is shorter than its own header")
    (length,) = struct.unpack("<Q", body[:8])
    if length > len(body) - 8:
        raise WireError("the body's header claims more bytes than the body has")
    entries = json.loads(bytes(body[8 : 8 + length]), parse_constant=_reject_constant)
    data = body[8 + length :]
    if not isinstance(entries, dict):
        raise WireError("the body's header is no mapping")
    found: dict[str, tuple[torch.dtype, int, memoryview]] = {}
    at = 0
    for name, entry in entries.items():
        dtype, (count,), (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if (
            type(count) is not int
            or count < 0
            or start != at
            or end != start + count * dtype.itemsize
            or end > len(data)
        ):
            raise WireError("the parts of the body do not lie one after another")
        found[name] = dtype, count, data[start:end]
        at = end
    if at != len(data):
        raise WireError("the body has bytes that belong to no part")
    return found


def _payload(header: dict[str, Any], parts: dict[str, tuple[torch.dtype, int, memoryview]]) -> Payload:
    """Build the payload: plain tensors if no operator was used, else encoded parts for messages/operators/chain.py."""
    operators, table, notes = header["operators"], Table.from_json(header["table"]), header["notes"]
    if not isinstance(operators, list) or not isinstance(notes, list) or len(operators) != len(notes):
        raise WireError("the lists of operators and of their notes do not have the same length")
    if len(operators) > limits.OPERATORS:
        raise WireError(f"the message names more than {limits.OPERATORS} operators")
    if operators:
        flat = {n: _copy_aligned(data, dtype, (count,)) for n, (dtype, count, data) in parts.items()}
        coding = {"operators": operators, "table": header["table"], "notes": notes}
        return Payload(flat, header["meta"], coding)
    check_parts(
        {n: torch.empty(count, dtype=dtype, device="meta") for n, (dtype, count, _) in parts.items()}, table.spec()
    )
    tensors: dict[str, torch.Tensor] = {}
    for part, rows in table.rows.items():
        dtype, _, data = parts[part]
        tensors |= _copy_all_aligned(data, dtype, rows)
    return Payload(dict(sorted(tensors.items())), header["meta"])


def _copy_aligned(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Copy a tensor to its own aligned memory: sums depend on alignment, and so on its place in the message."""
    made = torch.empty(shape, dtype=dtype)
    if made.numel():
        window: Any = made.reshape(-1).view(torch.uint8).numpy()
        memoryview(window)[:] = data
    return made


def _copy_all_aligned(data: memoryview, dtype: torch.dtype, rows: Rows) -> dict[str, torch.Tensor]:
    """Copy all tensors of a part into one buffer, each aligned: the same as `_copy_aligned` for each, in far fewer steps.

    If alignment needs no padding, this is one copy. That holds for every LoRA of a model of usual sizes.
    """
    room = ALIGNMENT // dtype.itemsize
    counts = [prod(shape) for _, shape in rows]
    rooms = [-(-count // room) * room for count in counts]
    made = torch.empty(sum(rooms), dtype=dtype)
    window: Any = made.view(torch.uint8).numpy()
    into = memoryview(window)
    if rooms == counts:
        into[:] = data
    else:
        at, read = 0, 0
        for count, place in zip(counts, rooms, strict=True):
            size = count * dtype.itemsize
            into[at : at + size] = data[read : read + size]
            at, read = at + place * dtype.itemsize, read + size
    pieces = zip(rows, torch.split(made, rooms), counts, rooms, strict=True)
    return {n: (p if c == r else p[:c]).view(shape) for (n, shape), p, c, r in pieces}


def _reject_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a finite number")


Made = TypeVar("Made", Assignment, Update, Failure, Cost)


def _build(cls: type[Made], fields: object, **own: Any) -> Made:
    """Build `cls` from a message's fields and separately decoded values.

    Raises WireError for unknown or missing fields.
    """
    if not isinstance(fields, dict):
        raise WireError(f"the fields of a message are a {type(fields).__name__} and not a mapping")
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)} | set(fields) & set(own)
    if unknown:
        raise WireError(f"unknown fields {sorted(unknown)} in a message: the other side runs another version")
    try:
        return cls(**fields, **own)
    except TypeError as error:
        raise WireError("fields are missing in a message: the other side runs another version") from error
