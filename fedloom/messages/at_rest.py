"""Store a payload as one file: tensors, metadata, a version and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedloom.messages.names import prefixed
from fedloom.messages.types import Payload

#: Version of the format. In version 2 a round's notes are under `gathering`, with virtual time among them.
VERSION = 2


class DamagedFile(ValueError):
    """A stored payload that cannot be read; the message says why."""


def to_bytes(payload: Payload) -> bytes:
    """Encode tensors and metadata as one safetensors file."""
    assert payload.coding is None, "a payload is decoded before it is stored"
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in payload.tensors.items()}
    about = {"version": str(VERSION), "meta": json.dumps(payload.meta), "sha256": _digest(tensors)}
    return save(tensors, metadata=about)


def from_bytes(data: bytes) -> Payload:
    """Decode what `to_bytes` encoded. Raises Damaged."""
    try:
        (length,) = (int.from_bytes(data[:8], "little"),)
        header = json.loads(data[8 : 8 + length])["__metadata__"]
        payload = Payload(load(data), json.loads(header["meta"]))
        whole = header["sha256"] == _digest(payload.tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"its tensors cannot be read ({type(error).__name__})") from error
    if not whole:
        raise DamagedFile("its tensors were altered")
    return payload


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 (hex) of names, dtypes, shapes and bytes; safetensors itself would not notice a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode_state(state: Mapping[str, Payload]) -> bytes | None:
    """Encode a client's state as one file; None if all of it is empty."""
    if not any(p.tensors or p.meta for p in state.values()):
        return None
    tensors: dict[str, torch.Tensor] = {}
    for section, payload in state.items():
        tensors |= prefixed(payload.tensors, f"{section}/")
    return to_bytes(Payload(tensors, {section: p.meta for section, p in state.items()}))


def decode_state(data: bytes | None) -> dict[str, Payload]:
    """Decode what `encode_state` encoded. Raises Damaged."""
    if data is None:
        return {}
    payload = from_bytes(data)
    sections: dict[str, Payload] = {s: Payload({}, meta) for s, meta in payload.meta.items()}
    for name, tensor in payload.tensors.items():
        section, _, plain = name.partition("/")
        sections[section].tensors[plain] = tensor
    return sections


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises Damaged."""
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise DamagedFile(f"{path} cannot be read") from error
