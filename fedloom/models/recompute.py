"""Train in less memory with the same result: compute what a forward pass would store for backward a second time.

    recompute  each layer stores its input (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv
    1604.06174)
    chunks     head and loss are computed for a few supervised tokens at a time; only the hidden states are stored

Both run the same operations on the same numbers in the same order of layers, and dropout draws the same masks again.
This file does not know who trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from fedloom.models.adapters import AdaptedModel


def recompute_obstacle(model: AdaptedModel, packed: bool) -> str:
    """Return why this model's layers cannot be recomputed; empty if they can."""
    if not getattr(model.causal_lm, "supports_gradient_checkpointing", False):
        return "this model does not support gradient checkpointing"
    if model.prefixed and not packed:  # the prefix is a cache, which transformers drops here without an error
        return "a prefix in padded batches is a cache, and recomputed layers take no cache"
    return ""


@contextmanager
def save_memory(model: AdaptedModel, recompute: bool, chunk: int | None) -> Iterator[None]:
    """Store less for backward in this block: recompute layers, and compute the loss in chunks of `chunk` tokens."""
    if recompute:
        model.causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.loss_chunk = chunk
    try:
        yield
    finally:
        model.loss_chunk = None
        if recompute:
            model.causal_lm.activation_checkpointing_disable()


def plain_forward(layer: type) -> Callable[..., Any]:
    """Return a layer class's forward without the wrapper by which transformers recomputes it."""
    forward: Any = layer.forward  # type: ignore[attr-defined]
    plain: Callable[..., Any] = forward.__wrapped__ if issubclass(layer, GradientCheckpointingLayer) else forward
    return plain


class _Hidden(torch.nn.Module):
    """A replacement of the head that returns the hidden states."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.weight = head.weight  # some models read its dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@contextmanager
def without_head(model: AdaptedModel) -> Iterator[torch.nn.Module]:
    """Make the model's logits its last hidden states in this block, and yield the head."""
    head: Any = model.causal_lm.get_output_embeddings()
    owner, name = _find_place(model.causal_lm, head)
    setattr(owner, name, _Hidden(head))
    try:
        yield head
    finally:
        setattr(owner, name, head)


def _find_place(module: torch.nn.Module, wanted: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    for name, child in module.named_modules():
        if child is wanted:
            parent, _, last = name.rpartition(".")
            return module.get_submodule(parent), last
    raise AssertionError("a model's head is one of its modules")


def chunked_losses(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
    """Compute the cross-entropy of each label, [S] float32, from hidden [S, width].

    At most `chunk` rows of logits exist at a time.
    """

    def losses(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(states).float(), wanted, reduction="none")

    parts = [
        checkpoint(losses, states, wanted, use_reentrant=False)
        for states, wanted in zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
