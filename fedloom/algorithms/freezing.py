"""Keep some of the live adapter's tensors unchanged, bit for bit, while the others train.

Their gradient is zeroed before a step, so that clipping counts only the others. Their values are restored after the
step, because weight decay and momentum change a parameter without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fedloom.models.adapters import AdaptedModel


class Frozen:
    """The current values of the tensors `names` of the live adapter, or of a part of each.

    An algorithm creates one in `receive` and calls it from its own `before_step` and `after_step`.

    Args:
        part: (name, tensor) → the view of the tensor that is frozen; by default all of it.
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
        """Zero the gradient of the frozen tensors."""
        for _, gradient, _ in self._windows:
            gradient.zero_()

    def after_step(self) -> None:
        """Restore the values of the frozen tensors."""
        for values, _, kept in self._windows:
            values.copy_(kept)
