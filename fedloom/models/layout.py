"""An adapter: named tensors over one flat fp32 buffer, so that swapping, averaging and hashing are single passes.

The buffer has the tensors one after another in sorted name order; `views` are windows into it. This file does not
know where the names come from (LoRA, prefix tuning, a whole model) or what the numbers mean.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from math import prod

import torch

#: Elements of a block whose sum does not depend on the number of threads; sums of larger tensors do.
SUM_BLOCK = 32_768


#: Elements that are swapped at a time.
SWAP_BLOCK = 1 << 20


#: Elements that are added at a time.
ADD_BLOCK = 1 << 17


class Layout:
    """The place of each named tensor in a flat buffer, in sorted order. Equal names and shapes make equal layouts."""

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
        """Map each name to its window into `flat` ([numel]), which shares its memory."""
        return {
            name: flat[start : start + prod(shape)].view(shape)
            for (name, shape), start in zip(self.shapes.items(), self.offsets.values(), strict=True)
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.shapes == other.shapes

    def __hash__(self) -> int:
        return hash(tuple(self.shapes.items()))


class Adapter:
    """The trainable part of a model: named fp32 tensors over one flat buffer, by default a new buffer of zeros.

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
        """Return a new adapter with copies of `tensors`."""
        adapter = cls(Layout({name: t.shape for name, t in tensors.items()}))
        adapter.load(tensors)
        return adapter

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors` in by name. Raises ValueError that lists missing and unexpected names and wrong shapes."""
        check_names(self.layout, tensors)
        for name, view in self.views.items():
            view.copy_(tensors[name])

    def copy_(self, flat: torch.Tensor) -> None:
        """Copy `flat` ([numel]) into the buffer, in one pass."""
        self.flat.copy_(flat)

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Name → window, in sorted name order. Not copies: clone before keeping.

        Args:
            prefix: put before each name.
        """
        return {prefix + name: view for name, view in self.views.items()} if prefix else dict(self.views)

    def snapshot(self) -> Adapter:
        """Return a copy on the CPU, which later training does not change."""
        copy = Adapter(self.layout)
        copy.flat.copy_(self.flat)
        return copy

    def sha256(self) -> str:
        """Return the sha256 (hex) of the flat fp32 bytes in sorted name order."""
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
    """Sum a 1-D tensor in fixed blocks, so that the scalar does not depend on the number of threads."""
    values = values.flatten()
    while values.numel() > SUM_BLOCK:
        values = torch.stack([block.sum() for block in torch.split(values, SUM_BLOCK)])
    return values.sum()


def joint_window(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return one window [numel] over all of `tensors`, if they lie one after another in one memory.

    They do after a message has been decoded. Returns None if they do not; the caller then handles them one by one.
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
    """Return whether every element is finite. The sum shows it in one pass, unless the sum itself overflows."""
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


@torch.no_grad()
def swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """Swap the contents of two contiguous tensors of the same shape."""
    for a, b in zip(torch.split(one.view(-1), SWAP_BLOCK), torch.split(other.view(-1), SWAP_BLOCK), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


class WeightedMean:
    """The mean Σ w_k x_k / Σ w_k with integer weights, in fp64, with one division at the end and one accumulator.

    Updates that are added in a fixed order give the same bits, whatever order they arrived in. The coordinator adds
    them in client order.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.total = 0
        self._sum = torch.zeros(layout.numel, dtype=torch.float64)
        self._views = layout.views(self._sum)

    def add(self, tensors: Mapping[str, torch.Tensor], weight: int, scale: float = 1.0) -> None:
        """Add `scale` × one update. Raises ValueError for names or shapes that do not fit, or a weight below 1."""
        if weight < 1:
            raise ValueError(f"the weight of an update is {weight}, but must be at least 1 (its number of examples)")
        check_names(self.layout, tensors)
        # To add fp32 to fp64, torch first copies to fp64. A block's copy stays in the CPU cache; a whole one would not.
        whole = joint_window([tensors[name] for name in self._views])
        if whole is not None:
            for block, values in zip(torch.split(self._sum, ADD_BLOCK), torch.split(whole, ADD_BLOCK), strict=True):
                block.add_(values, alpha=weight * scale)
        else:
            for name, view in self._views.items():
                view.add_(tensors[name].detach().cpu(), alpha=weight * scale)
        self.total += weight

    def result(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the mean, [numel]. Raises ValueError if nothing was added."""
        if not self.total:
            raise ValueError("the mean of no updates does not exist")
        return torch.div(self._sum, self.total, out=torch.empty(self.layout.numel, dtype=dtype))
