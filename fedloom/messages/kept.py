"""The rules for `kept`, what an algorithm or a hook remembers between rounds: named tensors and a small JSON dict.

Whatever breaks them is refused when it is stored, and not when a killed run is resumed and it is too late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedloom.messages import limits
from fedloom.messages.operators.flat import DTYPES
from fedloom.messages.types import Payload, check_metadata


def check_kept(kept: Any, owner: str, reserved: Sequence[str] = ()) -> None:
    """Raise ValueError unless `kept` is a `Payload` that can be stored and that comes back as it is.

    Args:
        owner: what the sentence calls it, such as ``self.kept of FedAvgM``.
        reserved: prefixes of tensor names that belong to others in the same file.
    """
    if not isinstance(kept, Payload) or kept.coding is not None:
        raise ValueError(
            f"{owner} is a {type(kept).__name__}, but must be a plain Payload: write self.kept = Payload(tensors, meta)"
        )
    if len(kept.tensors) > limits.TENSORS:
        raise ValueError(
            f"{owner} has {len(kept.tensors)} tensors, but at most {limits.TENSORS} are kept: put several into one"
        )
    size = 0
    for name, tensor in kept.tensors.items():
        trouble = _trouble(name, tensor, reserved)
        if trouble:
            raise ValueError(f"{owner} has tensors[{name!r}], {trouble}")
        size += tensor.nbytes
    if size > limits.PAYLOAD_BYTES:
        raise ValueError(f"{owner} has {size} bytes, but at most {limits.PAYLOAD_BYTES} are kept: keep less")
    try:
        check_metadata(kept.meta)
    except ValueError as error:
        raise ValueError(
            f"{owner} has meta that cannot be kept ({error}): keep small JSON there, and tensors in kept.tensors"
        ) from None


def _trouble(name: Any, tensor: Any, reserved: Sequence[str]) -> str:
    """The second half of the sentence about one tensor; empty where it can be kept."""
    if not isinstance(name, str) or not 0 < len(name) <= limits.NAME_CHARACTERS:
        return f"whose name must be a string of 1 to {limits.NAME_CHARACTERS} characters: choose another name"
    taken = [prefix for prefix in reserved if name.startswith(prefix)]
    if taken:
        return f"but names that begin with {taken[0]!r} are fedloom's own: choose another name"
    if not isinstance(tensor, torch.Tensor):
        return f"which is a {type(tensor).__name__} and no tensor: keep it in kept.meta, or make a tensor of it"
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES.values():
        kind = f"{tensor.layout}, {tensor.dtype} on {tensor.device}".replace("torch.", "")
        return f"which cannot be stored ({kind}): keep a dense tensor of a plain number type"
    return ""
