"""An adapter is named tensors over one flat fp32 buffer, so that swapping, averaging and hashing are single passes.

The buffer holds the tensors one after another in sorted name order; `views` are windows into it. This file does not
know what made the names (LoRA, prefix tuning, a whole model) or what the numbers mean.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from math import prod

import torch

#: Sums over large tensors depend on the number of threads; sums of blocks of this many elements do not.
SUM_BLOCK = 32_768


#: Elements that two tensors exchange at a time.
SWAP_BLOCK = 1 << 20


#: Elements that are added at a time.
ADD_BLOCK = 1 << 17


class Layout:
    """Which tensor lies where in a flat buffer. Names are sorted; two layouts are equal if names and shapes are."""

    def __init__(self, shapes: Mapping[str, torch.Size | tuple[int, ...]]) -> None:
        self.shapes = {name: torch.Size(shapes[name]) for name in sorted(shapes)}
        self.offsets: dict[str, int] = {}
        position = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = position
            position += prod(shape)
        self.numel = position

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name → window into `flat` ([numel]), sharing its memory."""
        return {
            name: flat[start : start + prod(shape)].view(shape)
            for (name, shape), start in zip(self.shapes.items(), self.offsets.values(), strict=True)
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.shapes == other.shapes

    def __hash__(self) -> int:
        return hash(tuple(self.shapes.items()))


class Adapter:
    """The trainable part of a model: named fp32 tensors over one flat buffer, a new one of zeros or `flat` itself.

    Attributes:
        flat: [numel], float32, aligned.
        views: name → window into `flat`.
    """

    def __init__(self, layout: Layout, device: torch.device | str = "cpu", flat: torch.Tensor | None = None) -> None:
        self.layout = layout
        self.flat = torch.zeros(layout.numel, dtype=torch.float32, device=device) if flat is None else flat
        self.views = layout.views(self.flat)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Adapter:
        """A new adapter holding copies of `tensors`."""
        adapter = cls(Layout({name: t.shape for name, t in tensors.items()}))
        adapter.load(tensors)
        return adapter

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors` in by name. Raises ValueError that lists missing, unexpected and misshapen names."""
        check_names(self.layout, tensors)
        for name, view in self.views.items():
            view.copy_(tensors[name])

    def copy_(self, flat: torch.Tensor) -> None:
        """One flat copy, the simulator's swap. `flat`: [numel]."""
        self.flat.copy_(flat)

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Name → window, in sorted name order. Not copies: clone before keeping.

        Args:
            prefix: put before each name.
        """
        return {prefix + name: view for name, view in self.views.items()} if prefix else dict(self.views)

    def snapshot(self) -> Adapter:
        """A copy on the CPU that later training does not touch."""
        copy = Adapter(self.layout)
        copy.flat.copy_(self.flat)
        return copy

    def sha256(self) -> str:
        """sha256 (hex) of the flat fp32 bytes in sorted name order."""
        return hashlib.sha256(self.flat.detach().cpu().numpy().tobytes()).hexdigest()


def check_names(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless `tensors` has exactly the names and shapes of `layout`."""
    if tensors.keys() == layout.shapes.keys() and all(tensors[n].shape == s for n, s in layout.shapes.items()):
        return
    missing = [n for n in layout.shapes if n not in tensors]
    unexpected = [n for n in tensors if n not in layout.shapes]
    misshapen = [
        f"{n} {tuple(tensors[n].shape)} instead of {tuple(shape)}"
        for n, shape in layout.shapes.items()
        if n in tensors and tensors[n].shape != shape
    ]
    complaints = [
        f"{label}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if complaints:
        raise ValueError("tensors do not fit the adapter; " + "; ".join(complaints))


def block_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of a 1-D tensor in fixed blocks, so that it does not depend on the number of threads. Scalar."""
    values = values.flatten()
    while values.numel() > SUM_BLOCK:
        values = torch.stack([block.sum() for block in torch.split(values, SUM_BLOCK)])
    return values.sum()


def one_window(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """[numel]: one window over all of `tensors`, where they lie one after another in one memory, as a message leaves them.

    None where they do not: then whoever asks goes through them one by one.
    """
    if not tensors:
        return None
    first = tensors[0]
    start, numel = first.data_ptr(), 0
    for tensor in tensors:
        place = start + numel * first.element_size()
        if tensor.dtype != first.dtype or tensor.data_ptr() != place or not tensor.is_contiguous():
            return None
        numel += tensor.numel()
    storage = first.untyped_storage()
    if first.device.type != "cpu" or start + numel * first.element_size() > storage.data_ptr() + storage.nbytes():
        return None
    return first.detach().as_strided((numel,), (1,))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is. A sum tells in one pass; where it is not finite it may be the sum's own overflow."""
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


@torch.no_grad()
def exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    """Swap the contents of two tensors of one shape, each contiguous."""
    for a, b in zip(torch.split(one.view(-1), SWAP_BLOCK), torch.split(other.view(-1), SWAP_BLOCK), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


class WeightedMean:
    """Σ w_k x_k / Σ w_k with integer weights, in fp64, one division at the end. Memory for one accumulator.

    Folded in a fixed order (the coordinator hands updates over in client order) it gives the same bits whatever
    the order of arrival.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.total = 0
        self._sum = torch.zeros(layout.numel, dtype=torch.float64)
        self._views = layout.views(self._sum)

    def add(self, tensors: Mapping[str, torch.Tensor], weight: int, scale: float = 1.0) -> None:
        """Fold `scale` × one update in. Raises ValueError for foreign names or shapes, or a weight below 1."""
        if weight < 1:
            raise ValueError(f"weight is {weight}; an update counts at least one example")
        check_names(self.layout, tensors)
        # torch adds fp32 to fp64 by way of a copy in fp64: of a block, which stays in the cache, and not of all of it.
        whole = one_window([tensors[name] for name in self._views])
        if whole is not None:
            for block, values in zip(torch.split(self._sum, ADD_BLOCK), torch.split(whole, ADD_BLOCK), strict=True):
                block.add_(values, alpha=weight * scale)
        else:
            for name, view in self._views.items():
                view.add_(tensors[name].detach().cpu(), alpha=weight * scale)
        self.total += weight

    def result(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The mean, [numel]. Raises ValueError where nothing was added."""
        if not self.total:
            raise ValueError("the mean of no updates does not exist")
        return torch.div(self._sum, self.total, out=torch.empty(self.layout.numel, dtype=dtype))
