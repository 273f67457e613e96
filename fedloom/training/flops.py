"""Floating-point operations of a training step, from the shapes of the model's layers: a closed form, not a profile.

A frozen linear layer of n weights costs 2n per token forward and 2n backward (the gradient of its input); an adapter's
own weights cost another 2n (their own gradient). Attention costs two matmuls of 2·L²·width forward for a sequence of L
tokens and layer, and four backward; what a flash kernel recomputes is not counted. Padding is counted where it is
computed. The first layer's inputs need no gradient, which the form ignores: it overcounts by under 2 % in a model of
five layers and less in deeper ones. tests/training/test_flops.py checks it against torch's FlopCounterMode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedloom.data.batching import Batch

if TYPE_CHECKING:
    from fedloom.models.adapters import AdaptedModel


class Flops:
    """Counts for one model: built once, asked for each batch."""

    def __init__(self, model: AdaptedModel) -> None:
        config = model.causal_lm.config.get_text_config()
        head = model.causal_lm.get_output_embeddings()
        self._frozen = self._trained = 0
        for module in model.causal_lm.modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not head:  # Conv1D: GPT-2's linear layer
                if module.weight.requires_grad:
                    self._trained += module.weight.numel()
                else:
                    self._frozen += module.weight.numel()
        self._head = head.weight.numel()
        self._layers = config.num_hidden_layers
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._attention_width = width * config.num_attention_heads

    def of(self, batch: Batch) -> int:
        """Forward and backward over `batch`."""
        linear = batch.ids.numel() * (4 * self._frozen + 6 * self._trained)
        return int(linear + 4 * self._head * _logits(batch) + 3 * self._attention(batch))

    def forward(self, batch: Batch) -> int:
        """One forward pass alone, as training without gradients takes it."""
        linear = batch.ids.numel() * 2 * (self._frozen + self._trained)
        return int(linear + 2 * self._head * _logits(batch) + self._attention(batch))

    def _attention(self, batch: Batch) -> int:
        """The two matmuls of a forward pass, over all layers; backward takes twice as much."""
        lengths = batch.lengths if batch.packed else (batch.ids.shape[1],) * batch.ids.shape[0]
        return 4 * sum(n * n for n in lengths) * self._attention_width * self._layers


def _logits(batch: Batch) -> int:
    """Positions that logits are made for (models/forward.py): the labels', or whole columns from the first label's on."""
    if batch.packed or not len(batch.labels):
        return len(batch.labels)
    rows, width = batch.ids.shape
    return rows * (width - int((batch.where % width).min()))
