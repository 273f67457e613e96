"""The change of one base weight, dense or as two factors: check its shape, and add its effect beside 16-bit weights.

This file does not know which algorithm makes such changes, or where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch


def check_delta(
    name: str, weight: torch.Tensor | None, delta: Mapping[str, torch.Tensor], transposed: bool = False
) -> None:
    """Raise ValueError unless `delta` has one dense tensor or one pair of factors that fits this weight."""
    if weight is None:
        raise ValueError(f"the base delta names the weight {name}, which the base model does not have")
    if not weight.is_floating_point():
        raise ValueError(f"a base delta cannot be added to the quantised weight {name}")
    shape = tuple(weight.T.shape if transposed else weight.shape)
    parts = {n: tuple(delta[n].shape) for n in (name, f"{name}.B", f"{name}.A") if n in delta}
    fits = parts == {name: shape}
    if list(parts) == [f"{name}.B", f"{name}.A"]:
        left, right = parts[f"{name}.B"], parts[f"{name}.A"]
        fits = len(left) == len(right) == 2 and left[1] == right[0] and (left[0], right[1]) == shape
    if not fits:
        raise ValueError(f"the base delta has the shapes {parts}, but the weight {name} has the shape {shape}")


def make_delta_hook(delta: Sequence[torch.Tensor], active: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    """Return a forward hook that adds x·Δᵀ to a linear layer's output, in fp32.

    Args:
        delta: [Δ], or the factors [B, A] of Δ = B·A.
        active: the hook adds nothing while this returns False.
    """

    def hook(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not active():
            return output
        added = inputs[0].float()
        for factor in reversed(delta):
            added = torch.nn.functional.linear(added, factor)
        return (output.float() + added).to(output.dtype)

    return hook
