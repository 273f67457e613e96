"""Compress the weights of an emulator's middle for sending: as they are, in 8 or 4 bits, or as two thin factors.

Each compression turns weights into *latents*, which alignment may train. It renders latents into the weights that a
client computes with (differentiably), and encodes them as the tensors that are sent. A client decodes those to exactly
what `render` gave, bit for bit. Vectors (norms, biases) are small and are sent as they are.

Legend: W [out, in] or as stored; B [out, r], A [r, in]; s the scale of a block of `BLOCK` weights. This file does not
know which layers there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from fedloom.common.errors import UserError
from fedloom.models.lowrank import LowRank, one_thread

Tensors = Mapping[str, torch.Tensor]


#: Weights that share a scale, in the order of the flattened weight.
BLOCK = 128


class Compression(ABC):
    """A way to compress weights.

    Attributes:
        dtype: of the base model's weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def latents(self, weights: Tensors) -> dict[str, torch.Tensor]:
        """Return fp32 copies of `weights` in the form that is trained."""
        return {n: w.detach().float().clone() for n, w in weights.items()}

    def render(self, latents: Tensors) -> dict[str, torch.Tensor]:
        """Map each weight name to the weight that a client computes with. Differentiable in the latents."""
        return {n: w.to(self.dtype) for n, w in latents.items()}

    @abstractmethod
    def encode(self, latents: Tensors) -> dict[str, torch.Tensor]:
        """Return the tensors to send, detached."""

    @abstractmethod
    def decode(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """Return the weights from the tensors that were sent.

        Raises ValueError for tensors that do not fit `shapes`.
        """

    def count_numbers(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> int:
        """Count the numbers that a receiver stores: the weights, or the factors that they are computed from."""
        return sum(prod(s) for s in shapes.values())


class Plain(Compression):
    """No compression: the weights themselves."""

    def encode(self, latents: Tensors) -> dict[str, torch.Tensor]:
        return {n: w.detach().to(self.dtype) for n, w in latents.items()}

    def decode(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        return {n: check_shape(n, _get(wire, n), s).to(self.dtype) for n, s in shapes.items()}


class Quantised(Compression):
    """Integers of `bits` bits, with one fp32 scale s = max|w| / (2^(bits−1) − 1) for every `BLOCK` of them.

    Rounds to nearest, so |w − s·q| ≤ s/2. Alignment trains through the rounding as if it were not there (the
    straight-through estimator of Bengio et al., arXiv 1308.3432).
    """

    def __init__(self, dtype: torch.dtype, bits: int) -> None:
        super().__init__(dtype)
        self.bits = bits
        self.kind = f"int{bits}"

    def render(self, latents: Tensors) -> dict[str, torch.Tensor]:
        return {
            n: (_RoundStraightThrough.apply(w, self.bits) if w.ndim > 1 else w).to(self.dtype)  # type: ignore[no-untyped-call]
            for n, w in latents.items()
        }

    def encode(self, latents: Tensors) -> dict[str, torch.Tensor]:
        sent: dict[str, torch.Tensor] = {}
        for n, w in latents.items():
            if w.ndim < 2:
                sent[n] = w.detach().to(self.dtype)
                continue
            whole, sent[f"{n}/scale"] = quantise(w.detach(), self.bits)
            sent[f"{n}/{self.kind}"] = pack_nibbles(whole) if self.bits == 4 else whole
        return sent

    def decode(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        made = {}
        for n, shape in shapes.items():
            if len(shape) < 2:
                made[n] = check_shape(n, _get(wire, n), shape).to(self.dtype)
                continue
            size = prod(shape)
            blocks = -(-size // BLOCK)
            length = torch.Size([blocks * BLOCK // (2 if self.bits == 4 else 1)])
            whole = check_shape(n, _get(wire, f"{n}/{self.kind}"), length)
            scale = check_shape(n, _get(wire, f"{n}/scale"), torch.Size([blocks]))
            whole = unpack_nibbles(whole) if self.bits == 4 else whole
            made[n] = dequantise(whole, scale, shape).to(self.dtype)
        return made


class Factored(Compression):
    """Two factors B·A of rank r = ⌈share · min(out, in)⌉: the best approximation of that rank (Eckart–Young)."""

    def __init__(self, dtype: torch.dtype, share: float) -> None:
        super().__init__(dtype)
        self.share = share

    def rank(self, shape: torch.Size) -> int:
        return max(1, -int(-self.share * min(shape) // 1))

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise UserError if the factors have at least as many numbers as the weights that they replace."""
        weights = [s for s in shapes.values() if len(s) == 2]
        factors, whole = sum(self.rank(s) * sum(s) for s in weights), sum(prod(s) for s in weights)
        if factors >= whole:
            raise UserError(
                f"algorithm.keep_rank={self.share:g} makes factors of {factors:,} numbers from a middle of {whole:,}, "
                "which saves nothing: set it lower, at 0.5 or less for square weights"
            )

    def latents(self, weights: Tensors) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for n, w in weights.items():
            if w.ndim == 2:
                low = factorise(w, self.rank(w.shape))
                made[f"{n}/A"], made[f"{n}/B"] = low.a, low.b
            else:
                made[n] = w.detach().float().clone()
        return made

    def render(self, latents: Tensors) -> dict[str, torch.Tensor]:
        return self._multiply({n: t.to(self.dtype) for n, t in latents.items()})

    def encode(self, latents: Tensors) -> dict[str, torch.Tensor]:
        return {n: t.detach().to(self.dtype) for n, t in latents.items()}

    def decode(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        for n, s in shapes.items():
            parts = {f"{n}/A": (self.rank(s), s[1]), f"{n}/B": (s[0], self.rank(s))} if len(s) == 2 else {n: s}
            for part, shape in parts.items():
                check_shape(part, _get(wire, part), torch.Size(shape))
        return self._multiply(wire)

    def count_numbers(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> int:
        return sum(t.numel() for t in wire.values())

    def _multiply(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        made = {}
        for n, t in tensors.items():
            if n.endswith("/A"):
                weight = n.removesuffix("/A")
                made[weight] = (tensors[f"{weight}/B"].float() @ t.float()).to(self.dtype)
            elif not n.endswith("/B"):
                made[n] = t.to(self.dtype)
        return made


def make_compression(kind: str, dtype: torch.dtype, bits: int, share: float) -> Compression:
    """Build a compression. `kind` as in a recipe: drop_layers (weights as they are), quantize or low_rank."""
    makers: dict[str, Any] = {
        "drop_layers": lambda: Plain(dtype),
        "quantize": lambda: Quantised(dtype, bits),
        "low_rank": lambda: Factored(dtype, share),
    }
    made: Compression = makers[kind]()
    return made


@one_thread()
def factorise(weight: torch.Tensor, rank: int) -> LowRank:
    """Return the balanced factors U√S and √S Vh of the leading `rank` singular directions of `weight` [out, in].

    Computed in fp64; the result is fp32.
    """
    u, s, vh = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)
    root = s[:rank].sqrt()
    low = LowRank(u[:, :rank] * root, root[:, None] * vh[:rank]).single()
    return LowRank(low.b.contiguous().to(weight.device), low.a.contiguous().to(weight.device))


def quantise(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (integers [blocks · BLOCK] int8, scales [blocks] fp32) of a flattened weight.

    The last block is padded with zeros.
    """
    flat = weight.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(dim=1) / largest
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    whole = (blocks / safe[:, None]).round().clamp(-largest, largest).to(torch.int8)
    return whole.reshape(-1), scale


def dequantise(whole: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return s·q in fp32, in `shape`."""
    return (whole.view(-1, BLOCK).float() * scale[:, None]).reshape(-1)[: prod(shape)].view(shape)


def pack_nibbles(whole: torch.Tensor) -> torch.Tensor:
    """Pack [n] int8 in −7 … 7 → [n / 2] uint8, two per byte, the first in the low half."""
    pairs = (whole.to(torch.int16) + 8).view(-1, 2)
    return (pairs[:, 0] | (pairs[:, 1] << 4)).to(torch.uint8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    pairs = packed.to(torch.int16)
    return (torch.stack([pairs & 15, pairs >> 4], dim=1) - 8).to(torch.int8).view(-1)


class _RoundStraightThrough(torch.autograd.Function):
    """Quantise and dequantise a weight; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, bits: int) -> torch.Tensor:
        return dequantise(*quantise(weight, bits), weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def check_shape(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return `tensor`. Raises ValueError if its shape is not `shape`."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, but must have {tuple(shape)}")
    return tensor


def _get(wire: Tensors, name: str) -> torch.Tensor:
    if name not in wire:
        raise ValueError(f"the message has no tensor {name}")
    return wire[name]
