"""The model as it was before any training, on the weights that are there: no second model, no second copy of weights.

The adapter is switched off (peft's own switch; virtual tokens are left out), a base delta is taken out, and whatever of
the base itself trains (full fine-tuning, biases) changes places with what the seed's adapter was. All of it is undone bit
for bit afterwards. This file does not know what the reference is used for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fedloom.models.adapters import AdaptedModel


@contextmanager
def reference(model: AdaptedModel) -> Iterator[None]:
    """In this block `model` is its reference, without dropout and without gradients. Not between forward and backward."""
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
