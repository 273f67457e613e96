"""Attention for padding-free batches: several sequences in one row, each attending only to itself.

Registered with transformers as an attention function, so that every architecture which goes through its attention
interface takes it. The lengths of the sequences travel as the keyword `segment_lengths` from the model's forward down
to here, sealed where layers are compiled (training/compiling.py). Per-segment SDPA runs on CPU and GPU alike; no GPU
has run this file yet. It does not know what is trained.
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


class Sealed:
    """A value on its way through a compiled layer to its attention: torch would make code anew for every other tuple."""

    def __init__(self, value: Any) -> None:
        self.value = value


def opened(value: Any) -> Any:
    """What a keyword of a layer holds, whether or not it was sealed."""
    return value.value if isinstance(value, Sealed) else value


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer stops here and goes on behind it
def packed_attention(
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
    """Causal attention within each segment, and to this layer's prefix where there is one.

    Shapes: query [1, heads, T, d]; key and value [1, kv_heads, T, d]; returns [1, T, heads, d].
    `prefix_states` has for each layer the prefix's keys and values, each [1, kv_heads, v, d].
    Raises ValueError where it is called without `segment_lengths`, or for what SDPA cannot do.
    """
    lengths: tuple[int, ...] | None = opened(segment_lengths)
    states: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = opened(prefix_states)
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
    """Segments of one length, through one call: they are a batch without padding. Shapes as in `packed_attention`."""
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
    """[length, before + length] bool, True where a query may look; None where that is plain causal attention.

    `before` positions of a prefix come first, so a query stands at `before` + its own place in the segment, where
    SDPA's own is_causal would count from 0.
    """
    if not before and (window is None or length <= window):
        return None
    at = torch.arange(before + length, device=device)
    distance = at[before:, None] - at[None, :]
    seen: torch.Tensor = distance >= 0
    return seen & (distance < window) if window else seen


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


def plain(model: PreTrainedModel) -> str:
    """The attention function for padded batches and generation."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


@contextmanager
def using(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run this block with another attention function. A configuration value is set and put back; nothing is rebuilt."""
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before
