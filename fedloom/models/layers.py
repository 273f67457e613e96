"""Which of a decoder's layers train: those that a recipe names, and the lowest of those that do.

Below the lowest one nothing has a gradient, so a forward pass is all that is computed there (training/flops.py), and what
it gives for an example is always the same (prefix.py). This file does not know adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from fedloom.errors import UserError
from fedloom.models.emulator import find_layers

if TYPE_CHECKING:
    from fedloom.models.adapters import AdaptedModel


def chosen_layers(
    model: nn.Module, wanted: Sequence[int] | str | None, within: Sequence[str] | None = None
) -> Sequence[str] | None:
    """What the names of the wanted layers' tensors begin with; None: all layers.

    Args:
        wanted: the recipe's wish: numbers from 0, or ``last-N``, or none.
        within: what an algorithm has chosen by itself.

    Raises UserError where both have chosen, or the model does not have such layers.
    """
    if wanted is None:
        return within
    if within is not None:
        raise UserError("adapter.layers says which layers train, and so does this algorithm: leave adapter.layers out")
    path, layers = find_layers(model)
    total = len(layers)
    if isinstance(wanted, str):
        count = int(wanted.removeprefix("last-"))
        numbers: Sequence[int] = range(total - count, total)
    else:
        numbers = sorted(set(wanted))
    if numbers[0] < 0 or numbers[-1] >= total:
        raise UserError(
            f"adapter.layers={wanted if isinstance(wanted, str) else list(wanted)} but the model has {total} layers "
            f"(0 to {total - 1}): name some of those"
        )
    return tuple(f"{path}.{number}." for number in numbers)


def first_trained(model: AdaptedModel) -> int:
    """How many layers lie below all that trains; 0 where something outside of the layers does, or they are in no list."""
    try:
        _, layers = find_layers(model.causal_lm)
    except UserError:
        return 0
    inside = {id(p) for p in layers.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in model.module.parameters()):
        return 0
    trained = [i for i, layer in enumerate(layers.children()) if any(p.requires_grad for p in layer.parameters())]
    return trained[0] if trained else 0
