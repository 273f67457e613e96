"""Which of a decoder's layers train: those that a recipe names, and the lowest of those that do.

Below the lowest one nothing has a gradient, so a forward pass is all that is computed there (training/flops.py), and
what it gives for an example is always the same (prefix_cache.py). This file does not know adapters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedloom.common.errors import UserError

if TYPE_CHECKING:
    from fedloom.models.adapters import AdaptedModel


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, the ModuleList of the decoder's layers). Raises UserError where there is none."""
    config: Any = model.config
    total = config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name, module
    raise UserError(
        f"{type(model).__name__} has no single list of its {total} layers, as offsite tuning and adapter.layers need it: "
        "use another model, or train the whole one"
    )


def targets_within(model: nn.Module, wanted: str | Sequence[str] | None, within: Sequence[str]) -> str:
    """A pattern over module names: those of `wanted` (as adapter.target_modules) that lie under the prefixes `within`.

    Raises UserError where there are none.
    """
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    names = {n for n in linear if n.startswith(tuple(within))}
    if isinstance(wanted, str) and wanted != "all-linear":
        names = {n for n in names if re.fullmatch(wanted, n)}
    elif wanted is not None and wanted != "all-linear":
        names = {n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)}
    if not names:
        raise UserError(f"adapter.target_modules={wanted!r} names no linear layer of the layers that are tuned")
    inner = sorted({n.removeprefix(prefix) for n in names for prefix in within if n.startswith(prefix)})
    parts = ("|".join(re.escape(x) for x in each) for each in (within, inner))
    return "({})({})".format(*parts)


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
