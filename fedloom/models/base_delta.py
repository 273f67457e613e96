"""One change of a base weight, dense or as two factors: whether it fits, and how it is added beside 16-bit weights.

This file does not know which algorithm makes such changes, nor where they are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch


def check_delta(
    name: str, weight: torch.Tensor | None, delta: Mapping[str, torch.Tensor], transposed: bool = False
) -> None:
    """Raise ValueError unless `delta` has, for this weight, one dense tensor or one pair of factors that fits."""
    if weight is None:
        raise ValueError(f"the base has no weight {name}")
    if not weight.is_floating_point():
        raise ValueError(f"a base delta cannot be added to the quantised weight {name}")
    shape = tuple(weight.T.shape if transposed else weight.shape)
    parts = {n: tuple(delta[n].shape) for n in (name, f"{name}.B", f"{name}.A") if n in delta}
    fits = parts == {name: shape}
    if list(parts) == [f"{name}.B", f"{name}.A"]:
        left, right = parts[f"{name}.B"], parts[f"{name}.A"]
        fits = len(left) == len(right) == 2 and left[1] == right[0] and (left[0], right[1]) == shape
    if not fits:
        raise ValueError(f"a base delta of {parts} does not fit the weight {name} {shape}")


def adding(delta: Sequence[torch.Tensor], active: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    """A forward hook that adds x·Δᵀ to a linear layer's output, in fp32. `delta`: [Δ], or [B, A] with Δ = B·A.

    It adds nothing while `active` says no.
    """

    def hook(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not active():
            return output
        added = inputs[0].float()
        for factor in reversed(delta):
            added = torch.nn.functional.linear(added, factor)
        return (output.float() + added).to(output.dtype)

    return hook
