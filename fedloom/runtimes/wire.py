"""Messages as bytes: a JSON header, then tensors as safetensors. Nothing on the wire can carry code.

    magic "FLM1" | header length, uint32 little-endian | header, UTF-8 JSON | body, safetensors

The header names the kind of message, its fields, and the sha256 and length of the body. What is read is bounded before
anything is allocated: a message says how long it is, and is refused when it is longer than the caller allows. This
file does not know who sends or what the tensors mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedloom.types import Assignment, Cost, Failure, Outcome, Payload, Update

MAGIC = b"FLM1"
MAX_HEADER_BYTES = 1 << 20


class WireError(ValueError):
    """A message that cannot be read: truncated, altered, too large or of another version."""


def encode_assignment(assignment: Assignment) -> bytes:
    fields = {f.name: getattr(assignment, f.name) for f in dataclasses.fields(assignment) if f.name != "payload"}
    return _pack({"message": "assignment", "fields": fields}, assignment.payload)


def decode_assignment(message: bytes, max_bytes: int | None = None) -> Assignment:
    header, payload = _unpack(message, ("assignment",), max_bytes)
    return _made(Assignment, header.get("fields"), payload=payload)


def encode_outcome(outcome: Outcome) -> bytes:
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
    return _pack(header, outcome.payload if isinstance(outcome, Update) else Payload())


def decode_outcome(message: bytes, max_bytes: int | None = None) -> Outcome:
    header, payload = _unpack(message, ("update", "failure"), max_bytes)
    cost = _made(Cost, header.get("cost"))
    if header["message"] == "update":
        return _made(Update, header.get("fields"), payload=payload, cost=cost)
    return _made(Failure, header.get("fields"), cost=cost)


def _pack(header: dict[str, Any], payload: Payload) -> bytes:
    body = save({name: tensor.detach().cpu().contiguous() for name, tensor in payload.tensors.items()})
    header = {**header, "meta": payload.meta, "body": {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}}
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise WireError(f"the header has {len(text)} bytes; at most {MAX_HEADER_BYTES} are sent")
    return MAGIC + struct.pack("<I", len(text)) + text + body


def _unpack(message: bytes, kinds: tuple[str, ...], max_bytes: int | None) -> tuple[dict[str, Any], Payload]:
    if max_bytes is not None and len(message) > max_bytes:
        raise WireError(f"the message has {len(message)} bytes; at most {max_bytes} are taken")
    if message[:4] != MAGIC or len(message) < 8:
        raise WireError("this is no fedloom message, or one of another version")
    (length,) = struct.unpack("<I", message[4:8])
    if length > MAX_HEADER_BYTES or 8 + length > len(message):
        raise WireError(f"the header claims {length} bytes, more than there are")
    try:
        header = json.loads(message[8 : 8 + length], parse_constant=_refused)
        body = memoryview(message)[8 + length :]
        if len(body) != header["body"]["bytes"] or hashlib.sha256(body).hexdigest() != header["body"]["sha256"]:
            raise WireError("the body is not what its header says: truncated or altered on its way")
        if header["message"] not in kinds:
            raise WireError(f"expected a message of kind {' or '.join(kinds)}, got {header['message']!r}")
        if not isinstance(header["meta"], dict):
            raise WireError("the metadata is no mapping")
        tensors: dict[str, torch.Tensor] = load(bytes(body))
        return header, Payload(tensors, header["meta"])
    except WireError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise WireError(f"the message cannot be read: {type(error).__name__}") from error


def _refused(word: str) -> Any:
    raise ValueError(f"{word} is no finite number")


Made = TypeVar("Made", Assignment, Update, Failure, Cost)


def _made(cls: type[Made], fields: object, **own: Any) -> Made:
    """`cls` from a message's fields and what was decoded beside them. Raises WireError for others than it has."""
    if not isinstance(fields, dict):
        raise WireError(f"the fields of a message are a {type(fields).__name__} and not a mapping")
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)} | set(fields) & set(own)
    if unknown:
        raise WireError(f"unknown fields {sorted(unknown)} in a message: the other side runs another version")
    try:
        return cls(**fields, **own)
    except TypeError as error:
        raise WireError("fields are missing in a message: the other side runs another version") from error
