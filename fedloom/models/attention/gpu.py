"""Attention of padding-free batches by a GPU's kernels, and which one a model gets.

    sdpa                 a call for each segment, on CPU and GPU alike (packed.py)
    flash_attention_2    one call for all segments, with their ends (Dao, arXiv 2307.08691); package flash-attn, 16 bits
    flex                 one compiled call with a mask by blocks (torch's flex_attention)

`auto` is flash_attention_2 where that can be had and sdpa elsewhere: flex only by wish until a GPU has timed it. No GPU
has run this file yet: the choice is tested with a played device, flash's arguments with a function that does what the
package says it does, flex's mask by torch's own CPU kernel, forward only. It does not know what is trained.
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
from fedloom.models.attention.packed import NAME, Sealed, opened

#: A recipe's word → the function's name in transformers' table.
PACKED = {"sdpa": NAME, "flash_attention_2": "fedloom_packed_flash", "flex": "fedloom_packed_flex"}


def choose_attention(wanted: str, device: str, dtype: torch.dtype, dropout: float = 0.0) -> str:
    """sdpa, flash_attention_2 or flex. Raises UserError where what is wanted cannot be had.

    Args:
        dropout: of the base's own attention in training.
    """
    if wanted == "auto":
        return "sdpa" if _trouble("flash_attention_2", device, dtype, dropout) else "flash_attention_2"
    why = _trouble(wanted, device, dtype, dropout)
    if why:
        raise UserError(f"model.attention={wanted} cannot be had: {why}; set model.attention=sdpa")
    return wanted


def _trouble(name: str, device: str, dtype: torch.dtype, dropout: float) -> str:
    if name == "sdpa":
        return ""
    if not device.startswith("cuda"):
        return f"it runs on a GPU alone, and the model is on {device}"
    if name == "flex":
        if dropout:
            return "it draws no dropout, which this model's attention has"
        return "" if importlib.util.find_spec("triton") else "it is compiled by triton, which is not installed"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if dtype == torch.float32:
        return "it takes 16-bit numbers, and model.dtype=float32"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, and this GPU has {major}.{minor}"
    try:
        _varlen()
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
    segment_lengths: tuple[int, ...] | Sealed | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix_states: Sequence[tuple[torch.Tensor, torch.Tensor]] | Sealed | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `attention.packed_attention`. flash-attn's causal mask is aligned to the end of the keys, so a prefix fits."""
    lengths = _checked(opened(segment_lengths), attention_mask, softcap)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a rotation in the base's dtype leaves fp32
    key, value, before = _with_prefix(module, key, value, lengths, opened(prefix_states))
    queries, keys = lengths, [n + before for n in lengths]
    ends = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=query.device) for each in (queries, keys)]
    out = _varlen()(
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
    segment_lengths: tuple[int, ...] | Sealed | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix_states: Sequence[tuple[torch.Tensor, torch.Tensor]] | Sealed | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `attention.packed_attention`, without dropout."""
    lengths = _checked(opened(segment_lengths), attention_mask, softcap)
    if dropout:
        raise ValueError("flex attention draws no dropout")
    query, key = query.to(value.dtype), key.to(value.dtype)  # as above
    key, value, before = _with_prefix(module, key, value, lengths, opened(prefix_states))
    mask = _block_mask(lengths, before, sliding_window, str(query.device))
    out = _flex(query.device.type)(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] > key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _checked(lengths: tuple[int, ...] | None, mask: torch.Tensor | None, softcap: float | None) -> tuple[int, ...]:
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
    """(keys, values, v) with this layer's prefix of v positions in front of every segment. [1, kv_heads, T + N·v, d]."""
    if states is None:
        return key, value, 0
    front = states[int(module.layer_idx)]  # type: ignore[arg-type]
    joined = [
        torch.cat([part for own in torch.split(x, list(lengths), 2) for part in (f.to(x.dtype), own)], dim=2)
        for x, f in zip((key, value), front, strict=True)
    ]
    return joined[0], joined[1], int(front[0].shape[2])


def _varlen() -> Any:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


@cache
def _flex(device: str) -> Any:
    """Compiled, as it has to be to be quick; as it is on a CPU, where only its numbers are of interest."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


@lru_cache(maxsize=16)  # every layer of a pass asks for the same one
def _block_mask(lengths: tuple[int, ...], before: int, window: int | None, device: str) -> BlockMask:
    """Who sees whom: a query the prefix and what stands before it in its own segment, within the window."""
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
