"""Some of the live adapter's tensors kept as they are, bit for bit, while the others train.

Their gradient is zeroed before a step, so that clipping counts the rest alone, and their values are put back after it,
since weight decay and momentum move a parameter without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fedloom.models.adapters import AdaptedModel


class Frozen:
    """The tensors `names` of the live adapter, as they stand now, or a part of each.

    An algorithm makes one in `receive` and passes `before_step` and `after_step` on to it.

    Args:
        part: (name, tensor) → the window into the tensor that is kept; all of it unless given.
    """

    def __init__(
        self,
        model: AdaptedModel,
        names: Iterable[str],
        part: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
    ) -> None:
        gradients = model.adapter.layout.views(model.grad)
        windows = [(part(n, model.adapter.views[n]), part(n, gradients[n])) for n in names]
        self._windows = [(values, gradient, values.clone()) for values, gradient in windows]

    def before_step(self) -> None:
        for _, gradient, _ in self._windows:
            gradient.zero_()

    def after_step(self) -> None:
        for values, _, kept in self._windows:
            values.copy_(kept)
