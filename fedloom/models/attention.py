"""Attention for padding-free batches: several sequences in one row, each attending only to itself.

Registered with transformers as an attention function, so that every architecture which goes through its attention
interface takes it. The lengths of the sequences travel as the keyword `segment_lengths` from the model's forward down
to here. Per-segment SDPA runs on CPU and GPU alike; no GPU has run this file yet. It does not know what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "fedloom_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment.

    Shapes: query [1, heads, T, d]; key and value [1, kv_heads, T, d]; returns [1, T, heads, d].
    Raises ValueError where it is called without `segment_lengths`, or for what SDPA cannot do.
    """
    if segment_lengths is None or attention_mask is not None or softcap is not None:
        raise ValueError("packed attention needs segment_lengths, no mask and no softcap")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    lengths = list(segment_lengths)
    outputs = []
    for q, k, v in zip(*(torch.split(x, lengths, 2) for x in (query, key, value)), strict=True):
        mask = _window(q.shape[2], sliding_window, q.device) if sliding_window else None
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _window(length: int, window: int, device: torch.device) -> torch.Tensor | None:
    """[length, length] bool, True where a query may look; None where the window is wider than the sequence."""
    if length <= window:
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < window)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


@contextmanager
def using(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run this block with another attention function. A configuration value is set and put back; nothing is rebuilt."""
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before
