"""Find which of a decoder's layers train: those that a recipe names, and the lowest of them.

No gradient is needed below the lowest trained layer, so only a forward pass runs there (training/flops.py). The output
of those layers for an example is always the same (prefix_cache.py). This file does not know adapters.
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
    """Return (name, ModuleList) of the decoder's layers. Raises UserError if the model has no such list."""
    config: Any = model.config
    total = config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name, module
    raise UserError(
        f"{type(model).__name__} keeps its {total} layers in no single list, which offsite tuning and adapter.layers "
        "need: use another model, or train the whole model"
    )


def restrict_targets(model: nn.Module, wanted: str | Sequence[str] | None, within: Sequence[str]) -> str:
    """Return a regular expression over module names: `wanted` modules under the prefixes `within`.

    Args:
        wanted: as adapter.target_modules.
        within: prefixes of module names.

    Raises UserError if no linear layer matches.
    """
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    names = {n for n in linear if n.startswith(tuple(within))}
    if isinstance(wanted, str) and wanted != "all-linear":
        names = {n for n in names if re.fullmatch(wanted, n)}
    elif wanted is not None and wanted != "all-linear":
        names = {n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)}
    if not names:
        raise UserError(
            f"adapter.target_modules={wanted!r} matches no linear layer in the layers that train: name modules that "
            "those layers have, or leave adapter.target_modules out"
        )
    inner = sorted({n.removeprefix(prefix) for n in names for prefix in within if n.startswith(prefix)})
    parts = ("|".join(re.escape(x) for x in each) for each in (within, inner))
    return "({})({})".format(*parts)


def layer_prefixes(
    model: nn.Module, wanted: Sequence[int] | str | None, within: Sequence[str] | None = None
) -> Sequence[str] | None:
    """Return the name prefixes of the wanted layers' tensors; None means all layers.

    Args:
        wanted: adapter.layers: numbers from 0, or ``last-N``, or None.
        within: prefixes that the algorithm has chosen.

    Raises UserError if both are given, or if the model does not have such layers.
    """
    if wanted is None:
        return within
    if within is not None:
        raise UserError("adapter.layers cannot be used with an algorithm that chooses the layers: leave it out")
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


def first_trained_layer(model: AdaptedModel) -> int:
    """Return the index of the first trained layer; 0 if anything outside the layers trains, or there is no layer list."""
    try:
        _, layers = find_layers(model.causal_lm)
    except UserError:
        return 0
    inside = {id(p) for p in layers.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in model.module.parameters()):
        return 0
    trained = [i for i, layer in enumerate(layers.children()) if any(p.requires_grad for p in layer.parameters())]
    return trained[0] if trained else 0
