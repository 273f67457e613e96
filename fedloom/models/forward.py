"""One forward pass over a batch: the loss at every supervised token, for padded and packed batches.

Logits are computed only at positions with a label, which saves most of a small batch's memory. Training, evaluation and
every algorithm's own loss use this file; it does not know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedloom.data.batching import Batch, collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attention import packed as attention
from fedloom.models.attention.gpu import PACKED
from fedloom.models.prefix_cache import PrefixCache, use_prefix
from fedloom.models.recompute import chunked_losses, save_memory, without_head
from fedloom.models.virtual_tokens import with_virtual_tokens

#: Largest relative difference between packed and single losses. A model that ignores segments is off by 1e-1 or more.
PROBE_TOLERANCE = 1e-3


#: The same for kernels that add 16-bit numbers in another order.
KERNEL_TOLERANCE = 3e-2


def token_losses(model: AdaptedModel, batch: Batch) -> torch.Tensor:
    """Compute the cross-entropy at each supervised token: [S], float32, in the order of `batch.labels`."""
    batch = batch.to(model.device)
    if model.loss_chunk is not None:
        with without_head(model) as head:
            hidden = label_logits(model, batch)
        return chunked_losses(head, hidden, batch.labels, model.loss_chunk)
    return cross_entropy(label_logits(model, batch).float(), batch.labels, reduction="none")


def label_logits(model: AdaptedModel, batch: Batch) -> torch.Tensor:
    """Compute the logits at each supervised token: [S, vocabulary], in the order of `batch.labels`.

    `batch` has to be on the model's device.
    """
    if not batch.packed:
        return _padded_logits(model, batch)
    model.causal_lm.config._attn_implementation = PACKED[
        model.base.attention
    ]  # stays: a recomputed forward needs it too
    inputs = {
        "input_ids": batch.ids,
        "position_ids": batch.positions,
        "segment_lengths": batch.lengths,
        "logits_to_keep": batch.where,
        "use_cache": False,
    }
    if model.virtual_tokens:
        inputs = with_virtual_tokens(model, batch, inputs)
    with nullcontext() if model.prefix is None else use_prefix(model.prefix, model, batch):
        logits: torch.Tensor = (model.causal_lm if model.virtual_tokens else model.module)(**inputs).logits[0]
    return logits


def _padded_logits(model: AdaptedModel, batch: Batch) -> torch.Tensor:
    """Compute [S, vocabulary] by a padded forward pass. Logits cover only columns in which some row has a label."""
    columns, rows = batch.where % batch.ids.shape[1], batch.where // batch.ids.shape[1]
    first = int(columns.min()) if len(columns) else 0
    inserted = 0 if model.prefixed else model.virtual_tokens  # positions of prompt embeddings have logits too
    keep = torch.arange(first, batch.ids.shape[1], device=batch.ids.device) + inserted
    with attention.use_attention(model.causal_lm, plain_attention(model)):
        logits = model.module(
            input_ids=batch.ids, attention_mask=batch.mask, logits_to_keep=keep, use_cache=False
        ).logits
    chosen: torch.Tensor = logits[rows, columns - first]
    return chosen


def plain_attention(model: AdaptedModel) -> str:
    """Return the name of the attention function for padded batches and generation."""
    return attention.default_attention(model.causal_lm)


def default_peft_model(model: AdaptedModel) -> Any:
    """Return peft's model for use outside fedloom, with its usual attention: packed batches set another one."""
    model.causal_lm.config._attn_implementation = plain_attention(model)
    return model.module


@torch.no_grad()
def supports_packing(model: AdaptedModel) -> bool:
    """Check by two tiny forward passes whether two sequences in one row give the losses that each gives alone."""
    size = model.causal_lm.config.get_text_config().vocab_size
    rng = np.random.default_rng(0)
    probes = [TokenSequence(rng.integers(3, size, n).astype(np.int32), 1) for n in (9, 6)]
    alone = torch.cat([token_losses(model, collate([p], packed=False, pad=3)) for p in probes])
    try:
        together = token_losses(model, collate(probes, packed=True, pad=3))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        # The model does not take the keyword, rejects it, or reads the mask.
        model.causal_lm.config._attn_implementation = plain_attention(model)
        return False
    tolerance = PROBE_TOLERANCE if model.base.attention == "sdpa" else KERNEL_TOLERANCE
    close = bool((alone - together).abs().max() <= tolerance * alone.abs().max())
    if not close:
        model.causal_lm.config._attn_implementation = plain_attention(model)
    return close


@torch.no_grad()
def supports_chunks(model: AdaptedModel) -> bool:
    """Check by two tiny forward passes whether the logits are the head's output, with nothing done to them after."""
    ids = np.random.default_rng(0).integers(3, model.causal_lm.config.get_text_config().vocab_size, 9)
    batch = collate([TokenSequence(ids.astype(np.int32), 1)], packed=False, pad=3)
    whole = token_losses(model, batch)
    with save_memory(model, recompute=False, chunk=2):
        parts = token_losses(model, batch)
    return bool((whole - parts).abs().max() <= PROBE_TOLERANCE * whole.abs().max())


@torch.no_grad()
def supports_prefix(model: AdaptedModel) -> bool:
    """Check by two tiny forward passes whether a forward pass from the first trained layer gives the same losses."""
    size = model.causal_lm.config.get_text_config().vocab_size
    rng = np.random.default_rng(0)
    batch = collate([TokenSequence(rng.integers(3, size, n).astype(np.int32), 1) for n in (9, 6)], packed=True, pad=3)
    whole, before = token_losses(model, batch), model.prefix
    model.prefix = PrefixCache(model)
    try:
        parts = token_losses(model, batch)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # the layers take or return something unusual
        return False
    finally:
        model.prefix = before
    return bool((whole - parts).abs().max() <= PROBE_TOLERANCE * whole.abs().max())


def batch_by_length(
    sequences: Sequence[TokenSequence], size: int, *, packed: bool, pad: int, examples: Sequence[int]
) -> list[Batch]:
    """Put all sequences into batches of `size`, longest first: little padding, and no late peak of memory.

    Args:
        size: sequences per batch; the last batch may have fewer.
        packed: whether a batch is one row of segments, not padded rows.
        pad: id of the padding token.
        examples: index of each sequence's example, in the order of `sequences`.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    return [
        collate(
            [sequences[i] for i in order[start : start + size]],
            packed=packed,
            pad=pad,
            examples=[examples[i] for i in order[start : start + size]],
        )
        for start in range(0, len(order), size)
    ]
