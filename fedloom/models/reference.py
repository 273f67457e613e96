"""The model as it was before any training, without a second model or a second copy of weights.

peft switches the adapter off, virtual tokens are left out, and a base delta is taken out. Weights of the base that
train
(full fine-tuning, biases) are swapped with their initial values. Afterwards everything is restored bit for bit. This
file
does not know what the reference is used for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fedloom.models.adapters import AdaptedModel


@contextmanager
def reference(model: AdaptedModel) -> Iterator[None]:
    """Make `model` its own reference in this block, without dropout and gradients.

    Do not use it between a forward pass and its backward pass.
    """
    training = model.module.training
    virtual = model.virtual_tokens, model.prefixed
    with ExitStack() as undo, torch.no_grad():
        model.swap_trained()
        undo.callback(model.swap_trained)
        undo.callback(model.module.train, training)
        model.module.eval()
        if not model.full:
            undo.callback(_set_virtual, model, *virtual)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")  # swapped
                undo.enter_context(model.module.disable_adapter())
            _set_virtual(model, 0, False)
        yield


def _set_virtual(model: AdaptedModel, tokens: int, prefixed: bool) -> None:
    model.virtual_tokens, model.prefixed = tokens, prefixed
