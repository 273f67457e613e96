"""Compute the floating-point operations of a training step in closed form, from the shapes of the model's layers.

A frozen linear layer of n weights costs 2n per token forward and 2n backward (the gradient of its input). Trained weights
cost another 2n (their own gradient). Attention costs two matmuls of 2·L·K·width forward for L queries and K keys in a
layer, and four backward; operations that a flash kernel recomputes are not counted. Padding and virtual tokens are counted
where they are computed. Layers below the first trained one run forward only. The inputs of the first trained layer need no
gradient, which the formula ignores: it overcounts by under 2 % where five layers train, and less where more do.
tests/training/test_flops.py checks it against torch's FlopCounterMode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedloom.data.batching import Batch
from fedloom.models.layers import find_layers, first_trained_layer
from fedloom.models.quantised import linear_numel

if TYPE_CHECKING:
    from fedloom.models.adapters import AdaptedModel


#: Model → its counts, which do not change during training.
_COUNTS: WeakKeyDictionary[AdaptedModel, Flops] = WeakKeyDictionary()


def flops_of(model: AdaptedModel) -> Flops:
    """Return the counts of this model; the first call builds them."""
    counts = _COUNTS.get(model)
    if counts is None:
        counts = _COUNTS[model] = Flops(model)
    return counts


class Flops:
    """Counts operations of one model, per batch. Get it from `flops_of`, which keeps one for each model."""

    def __init__(self, model: AdaptedModel) -> None:
        config = model.causal_lm.config.get_text_config()
        head = model.causal_lm.get_output_embeddings()
        shapes = model.adapter.layout.shapes
        self._model = ref(model)  # weak: the table of counts must not keep the model alive
        self._full = model.full
        self._frozen = self._trained = 0
        self._first = first_trained_layer(model)
        for module in model.causal_lm.modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not head:  # Conv1D: GPT-2's linear layer
                if module.weight.requires_grad:
                    self._trained += module.weight.numel()
                else:
                    self._frozen += linear_numel(module)
        self._prefix_weights = sum(
            linear_numel(module)
            for layer in _below(model, self._first)
            for module in layer.modules()
            if isinstance(module, nn.Linear | Conv1D)
        )
        # AdaLoRA's factors are separate parameters, in no linear layer.
        self._trained += sum(shape.numel() for n, shape in shapes.items() if n.endswith((".lora_A", ".lora_B")))
        self._head = head.weight.numel()
        self._head_trained = bool(head.weight.requires_grad)
        self._layers = config.num_hidden_layers
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._attention_width = width * config.num_attention_heads
        # Virtual tokens: embeddings pass through the layers, a prefix is only keys and values; a network may compute them.
        self._inserted = 0 if model.prefixed else model.virtual_tokens
        self._prefix = model.virtual_tokens if model.prefixed else 0
        network = (s.numel() for n, s in shapes.items() if n.startswith("prompt_encoder.") and len(s) == 2)
        self._network = model.virtual_tokens * (sum(network) - _embedding(shapes))
        self._norms = sum(_dora_norm(n, shapes) for n in shapes if n.endswith(".lora_magnitude_vector"))

    def of(self, batch: Batch) -> int:
        """Count forward and backward over `batch`, whose loss was just computed."""
        linear = self._tokens(batch) * (4 * (self._frozen - self._prefix_weights) + 6 * self._trained)
        head = (6 if self._head_trained else 4) * self._head * _logits(batch)
        encoder = 6 * self._network * self._encoded(batch)
        attention = 3 * self._attention(batch, self._layers - self._first, self._inserted, self._prefix)
        return int(linear + head + encoder + self._norms + attention + self._below(batch))

    def forward(self, batch: Batch) -> int:
        """Count one forward pass that just ran, as in training without gradients."""
        linear = self._tokens(batch) * 2 * (self._frozen - self._prefix_weights + self._trained)
        encoder = 2 * self._network * self._encoded(batch)
        attention = self._attention(batch, self._layers - self._first, self._inserted, self._prefix)
        return int(linear + 2 * self._head * _logits(batch) + encoder + self._norms + attention + self._below(batch))

    def _below(self, batch: Batch) -> int:
        """Count the layers below the first trained one: forward only, and nothing for rows in the prefix cache."""
        if not self._first:
            return 0
        model = self._model()
        cache = None if model is None else model.prefix
        if cache is None or model is None or not cache.fits_model(model):
            return self._tokens(batch) * 2 * self._prefix_weights + self._attention(batch, self._first)
        computed = cache.computed
        return sum(computed) * 2 * self._prefix_weights + self._attended(computed, self._first)

    def without_adapter(self, batch: Batch) -> int:
        """Count one forward pass of the base without adapter that just ran, as for a reference model."""
        base = self._frozen - self._prefix_weights + (self._trained if self._full else 0)
        linear = batch.ids.numel() * 2 * base + 2 * self._head * _logits(batch)
        return int(linear + self._attention(batch, self._layers - self._first) + self._below(batch))

    def _tokens(self, batch: Batch) -> int:
        """Return how many positions pass through the layers."""
        return batch.ids.numel() + self._inserted * len(batch.lengths)

    def _encoded(self, batch: Batch) -> int:
        """Return how many times a prompt's network runs: for a padded batch, peft computes the prefix once for each row."""
        return len(batch.lengths) if self._prefix and not batch.packed else 1

    def _attention(self, batch: Batch, layers: int, inserted: int = 0, prefix: int = 0) -> int:
        """Count the two matmuls of a forward pass over `layers` layers; backward takes twice as much."""
        lengths = batch.lengths if batch.packed else (batch.ids.shape[1],) * batch.ids.shape[0]
        return self._attended([n + inserted for n in lengths], layers, prefix)

    def _attended(self, lengths: Sequence[int], layers: int, prefix: int = 0) -> int:
        return int(4 * sum(n * (n + prefix) for n in lengths) * self._attention_width * layers)


def _below(model: AdaptedModel, first: int) -> list[nn.Module]:
    """Return the layers below the first trained one."""
    return list(find_layers(model.causal_lm)[1].children())[:first] if first else []


def _embedding(shapes: Mapping[str, torch.Size]) -> int:
    """Return the elements of the virtual tokens' embedding table, a lookup without multiplication."""
    return shapes["prompt_encoder.embedding.weight"].numel() if "prompt_encoder.embedding.weight" in shapes else 0


def _dora_norm(name: str, shapes: Mapping[str, torch.Size]) -> int:
    """Count DoRA's B·A, computed in each forward pass for the norm of W + s·B·A; peft passes an identity through A and B."""
    stem = name.removesuffix(".lora_magnitude_vector")
    a, b = shapes[f"{stem}.lora_A.weight"], shapes[f"{stem}.lora_B.weight"]
    return 2 * a[1] * (a.numel() + b.numel())


def _logits(batch: Batch) -> int:
    """Return for how many positions logits are computed (models/forward.py): labels, or all columns from the first label."""
    if batch.packed or not len(batch.labels):
        return len(batch.labels)
    rows, width = batch.ids.shape
    return rows * (width - int((batch.where % width).min()))
