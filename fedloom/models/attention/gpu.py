"""Attention of padding-free batches by GPU kernels, and the choice of a kernel for a model.

    sdpa                 one call per segment, on CPU and GPU (packed.py)
    flash_attention_2    one call for all segments, given their ends (Dao, arXiv 2307.08691); package flash-attn, 16
    bits
    flex                 one compiled call with a block mask (torch's flex_attention)

`auto` is flash_attention_2 where it works and sdpa elsewhere. flex is used only on request, until it has been timed on
a
GPU. No GPU has run this file yet: tests use a simulated device for the choice, a function with the documented behaviour
of flash-attn for its arguments, and torch's own CPU kernel (forward only) for flex's mask. This file does not know what
is trained.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedloom.common.errors import UserError
from fedloom.models.attention.packed import NAME, Opaque, unwrap

#: Value of model.attention → the function's name in transformers' table.
PACKED = {"sdpa": NAME, "flash_attention_2": "fedloom_packed_flash", "flex": "fedloom_packed_flex"}


def choose_attention(wanted: str, device: str, dtype: torch.dtype, dropout: float = 0.0) -> str:
    """Choose sdpa, flash_attention_2 or flex. Raises UserError if the wanted one cannot be used here.

    Args:
        wanted: the recipe's model.attention.
        device: that computes.
        dtype: of the base's weights.
        dropout: of the base's own attention in training.
    """
    if wanted == "auto":
        return "sdpa" if _obstacle("flash_attention_2", device, dtype, dropout) else "flash_attention_2"
    why = _obstacle(wanted, device, dtype, dropout)
    if why:
        raise UserError(f"model.attention={wanted} cannot be used: {why}; set model.attention=sdpa")
    return wanted


def _obstacle(name: str, device: str, dtype: torch.dtype, dropout: float) -> str:
    if name == "sdpa":
        return ""
    if not device.startswith("cuda"):
        return f"it runs only on a GPU, and the model is on {device}"
    if name == "flex":
        if dropout:
            return "it has no dropout, and this model's attention needs it"
        return "" if importlib.util.find_spec("triton") else "it needs triton, which is not installed"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if dtype == torch.float32:
        return "it needs 16-bit numbers, but model.dtype=float32"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, and this GPU has {major}.{minor}"
    try:
        _flash_function()
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        return f"the package flash-attn is installed and cannot be imported ({(str(error).splitlines() or [''])[0]})"
    return ""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: tuple[int, ...] | Opaque | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix_states: Sequence[tuple[torch.Tensor, torch.Tensor]] | Opaque | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `packed_attention` does, by flash-attn.

    Its causal mask aligns to the end of the keys, so a prefix fits.
    """
    lengths = _check_arguments(unwrap(segment_lengths), attention_mask, softcap)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotary embedding leaves them in fp32
    key, value, before = _with_prefix(module, key, value, lengths, unwrap(prefix_states))
    queries, keys = lengths, [n + before for n in lengths]
    ends = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=query.device) for each in (queries, keys)]
    out = _flash_function()(
        *(x[0].transpose(0, 1) for x in (query, key, value)),  # [T, heads, d]
        *ends,
        max(queries),
        max(keys),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(sliding_window - 1, 0) if sliding_window else (-1, -1),
    )
    return out[None], None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_flex(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: tuple[int, ...] | Opaque | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix_states: Sequence[tuple[torch.Tensor, torch.Tensor]] | Opaque | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `packed_attention` does, by flex attention. Raises ValueError for dropout."""
    lengths = _check_arguments(unwrap(segment_lengths), attention_mask, softcap)
    if dropout:
        raise ValueError(f"flex attention has no dropout, but dropout={dropout}: use sdpa")
    query, key = query.to(value.dtype), key.to(value.dtype)  # as above
    key, value, before = _with_prefix(module, key, value, lengths, unwrap(prefix_states))
    mask = _block_mask(lengths, before, sliding_window, str(query.device))
    out = _flex_function(query.device.type)(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] > key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _check_arguments(
    lengths: tuple[int, ...] | None, mask: torch.Tensor | None, softcap: float | None
) -> tuple[int, ...]:
    if lengths is None or mask is not None or softcap is not None:
        raise ValueError("packed attention needs segment_lengths, no mask and no softcap")
    return lengths


def _with_prefix(
    module: torch.nn.Module,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    states: Sequence[tuple[torch.Tensor, torch.Tensor]] | None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return (keys, values, v) with this layer's prefix of v positions before every segment.

    Keys and values are [1, kv_heads, T + N·v, d] for N segments.
    """
    if states is None:
        return key, value, 0
    front = states[int(module.layer_idx)]  # type: ignore[arg-type]
    joined = [
        torch.cat([part for own in torch.split(x, list(lengths), 2) for part in (f.to(x.dtype), own)], dim=2)
        for x, f in zip((key, value), front, strict=True)
    ]
    return joined[0], joined[1], int(front[0].shape[2])


def _flash_function() -> Any:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


@cache
def _flex_function(device: str) -> Any:
    """Return flex attention: compiled on a GPU for speed, uncompiled on a CPU, where only tests run it."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


@lru_cache(maxsize=16)  # every layer of a forward pass needs the same mask
def _block_mask(lengths: tuple[int, ...], before: int, window: int | None, device: str) -> BlockMask:
    """Build the mask: a query sees the prefix and earlier positions of its own segment, within the window."""
    owners = [torch.full((n + extra,), i) for extra in (0, before) for i, n in enumerate(lengths)]
    places = [torch.arange(before - extra, before + n) for extra in (0, before) for n in lengths]
    count = len(lengths)
    own, other = (torch.cat(x).to(device) for x in (owners[:count], owners[count:]))
    at, seen = (torch.cat(x).to(device) for x in (places[:count], places[count:]))

    def sees(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        distance = at[q] - seen[k]
        allowed = (own[q] == other[k]) & (distance >= 0)
        return allowed & (distance < window) if window else allowed

    return create_block_mask(sees, None, None, len(own), len(other), device=device)


ALL_ATTENTION_FUNCTIONS.register(PACKED["flash_attention_2"], packed_flash)


ALL_ATTENTION_FUNCTIONS.register(PACKED["flex"], packed_flex)
