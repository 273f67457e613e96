"""Held-out loss, as sums over supervised tokens. A site may send them, and a server may add them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedloom.data.tokenization import TokenisedCorpus
from fedloom.models.adapters import AdaptedModel
from fedloom.models.forward import batch_by_length, token_losses
from fedloom.models.layout import block_sum


@torch.no_grad()
def loss_sums(
    model: AdaptedModel, sequences: TokenisedCorpus, indices: Sequence[int], *, batch_size: int, packed: bool
) -> tuple[float, int]:
    """Return (Σ token losses, number of supervised tokens) of the live model over these examples."""
    total, tokens = 0.0, 0
    chosen = [sequences[i] for i in indices]
    pad = model.tokenizer.pad_token_id or 0
    for batch in batch_by_length(chosen, batch_size, packed=packed, pad=pad, examples=list(indices)):
        total += float(block_sum(token_losses(model, batch)))
        tokens += len(batch.labels)
    return total, tokens
