"""Attention for padding-free batches: several sequences in one row, each of which attends only to itself.

It is registered with transformers as an attention function, so every architecture that uses transformers' attention
interface can use it. The model's forward passes the sequences' lengths down to here as the keyword `segment_lengths`,
wrapped where layers are compiled (training/compiling.py). SDPA per segment runs on CPU and GPU; no GPU has run
this file yet. It does not know what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "fedloom_packed"


class Opaque:
    """A value that a compiled layer passes on unread, since torch would compile again for every other tuple."""

    def __init__(self, value: Any) -> None:
        self.value = value


def unwrap(value: Any) -> Any:
    """Return the value of a layer's keyword, whether or not it is wrapped."""
    return value.value if isinstance(value, Opaque) else value


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled code of the layer continues after this call
def packed_attention(
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
    """Attend causally within each segment, and to this layer's prefix if there is one.

    Shapes: query [1, heads, T, d]; key and value [1, kv_heads, T, d]; returns [1, T, heads, d].
    `prefix_states` has each layer's prefix keys and values, each [1, kv_heads, v, d].
    Raises ValueError without `segment_lengths`, and with arguments that SDPA does not support.
    """
    lengths: tuple[int, ...] | None = unwrap(segment_lengths)
    states: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = unwrap(prefix_states)
    if lengths is None or attention_mask is not None or softcap is not None:
        raise ValueError("packed attention needs segment_lengths, no mask and no softcap")
    if states is None and len(set(lengths)) == 1 < len(lengths):
        return _equal_segments(query, key, value, lengths, dropout, scaling, sliding_window), None
    queries, keys, values = (list(torch.split(x, list(lengths), 2)) for x in (query, key, value))
    before = 0
    if states is not None:
        front = states[int(module.layer_idx)]  # type: ignore[arg-type]
        before = front[0].shape[2]
        keys = [torch.cat([front[0].to(k.dtype), k], dim=2) for k in keys]
        values = [torch.cat([front[1].to(v.dtype), v], dim=2) for v in values]
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mask = _mask(q.shape[2], before, sliding_window, q.device)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _equal_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute segments of equal length in one call, as a batch without padding. Shapes as in `packed_attention`."""
    count, length = len(lengths), lengths[0]
    q, k, v = (
        x.reshape(x.shape[1], count, length, -1).transpose(0, 1) for x in (query, key, value)
    )  # [N, heads, L, d]
    if q.shape[1] > k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    mask = _mask(length, 0, window, query.device)
    found = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling
    )
    return found.transpose(1, 2).reshape(1, count * length, q.shape[1], -1)


def _mask(length: int, before: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask [length, before + length], True where a query may look; None for plain causal attention.

    The prefix's `before` positions come first. So a query's position is `before` + its place in the segment; SDPA's own
    is_causal would count from 0.
    """
    if not before and (window is None or length <= window):
        return None
    at = torch.arange(before + length, device=device)
    distance = at[before:, None] - at[None, :]
    seen: torch.Tensor = distance >= 0
    return seen & (distance < window) if window else seen


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


def default_attention(model: PreTrainedModel) -> str:
    """Return the name of the attention function for padded batches and generation."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


@contextmanager
def use_attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Use another attention function in this block. Only a configuration value changes; nothing is rebuilt."""
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before
