"""Training in less memory for the same result: what a forward pass would keep for backward is computed a second time.

    recomputing  each layer keeps its input (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174)
    chunks       the head and the loss are taken for a few supervised tokens at a time; of each only the hidden state is kept

Both call the same operations on the same numbers in the same order of layers, and dropout draws the same masks again. This
file does not know who trains.
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


def can_recompute(model: AdaptedModel, packed: bool) -> str:
    """Why this model's layers cannot be computed again; empty where they can."""
    if not getattr(model.causal_lm, "supports_gradient_checkpointing", False):
        return "this model does not say how its layers are computed again"
    if model.prefixed and not packed:  # transformers drops a cache, which the prefix is there, without an error
        return "a prefix in padded batches is a cache, which layers that are computed again do not take"
    return ""


@contextmanager
def sparing(model: AdaptedModel, recompute: bool, chunk: int | None) -> Iterator[None]:
    """Training in this block keeps less."""
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
    """A layer's forward, without what transformers puts around it so that it can be computed again."""
    forward: Any = layer.forward  # type: ignore[attr-defined]
    plain: Callable[..., Any] = forward.__wrapped__ if issubclass(layer, GradientCheckpointingLayer) else forward
    return plain


class _Hidden(torch.nn.Module):
    """Stands in for the head and hands the hidden states on."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.weight = head.weight  # some models read its dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@contextmanager
def headless(model: AdaptedModel) -> Iterator[torch.nn.Module]:
    """In this block the model's logits are the hidden states before its head, which is given."""
    head: Any = model.causal_lm.get_output_embeddings()
    owner, name = _place(model.causal_lm, head)
    setattr(owner, name, _Hidden(head))
    try:
        yield head
    finally:
        setattr(owner, name, head)


def _place(module: torch.nn.Module, wanted: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    for name, child in module.named_modules():
        if child is wanted:
            parent, _, last = name.rpartition(".")
            return module.get_submodule(parent), last
    raise AssertionError("a model's head is one of its modules")


def chunked_losses(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
    """Cross-entropy of each label, [S] float32, from hidden [S, width]; at most `chunk` rows of logits are ever there."""

    def losses(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(states).float(), wanted, reduction="none")

    parts = [
        checkpoint(losses, states, wanted, use_reentrant=False)
        for states, wanted in zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
