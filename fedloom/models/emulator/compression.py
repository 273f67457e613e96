"""How the weights of an emulator's middle travel: as they are, in 8 or 4 bits, or as two thin factors.

Each way of compression turns weights into *latents*, which alignment may train, renders latents into the weights that a
client will compute with (differentiably), and writes them as the tensors that travel. What a client makes of those is
what `render` gave, bit for bit. Vectors (norms, biases) are small and travel as they are.

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


#: Weights that share a scale, counted along the flattened weight.
BLOCK = 128


class Compression(ABC):
    """Attributes:
    dtype: of the base model's weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def latents(self, weights: Tensors) -> dict[str, torch.Tensor]:
        """fp32 copies of `weights` in the form that is trained."""
        return {n: w.detach().float().clone() for n, w in weights.items()}

    def render(self, latents: Tensors) -> dict[str, torch.Tensor]:
        """Weight name → what a client computes with; differentiable in the latents."""
        return {n: w.to(self.dtype) for n, w in latents.items()}

    @abstractmethod
    def wire(self, latents: Tensors) -> dict[str, torch.Tensor]:
        """What travels, detached."""

    @abstractmethod
    def read(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """The client's half: weights from what travelled. Raises ValueError for what does not fit `shapes`."""

    def numbers(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> int:
        """Numbers of the model that a receiver holds: the weights, or what they are made of."""
        return sum(prod(s) for s in shapes.values())


class Plain(Compression):
    """The weights themselves."""

    def wire(self, latents: Tensors) -> dict[str, torch.Tensor]:
        return {n: w.detach().to(self.dtype) for n, w in latents.items()}

    def read(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        return {n: fitting(n, _taken(wire, n), s).to(self.dtype) for n, s in shapes.items()}


class Quantised(Compression):
    """Whole numbers in `bits` bits, and for every `BLOCK` of them one fp32 scale s = max|w| / (2^(bits−1) − 1).

    Rounding to nearest, so |w − s·q| ≤ s/2. Alignment trains through the rounding as if it were not there (the
    straight-through estimator of Bengio et al., arXiv 1308.3432).
    """

    def __init__(self, dtype: torch.dtype, bits: int) -> None:
        super().__init__(dtype)
        self.bits = bits
        self.kind = f"int{bits}"

    def render(self, latents: Tensors) -> dict[str, torch.Tensor]:
        return {
            n: (_Rounded.apply(w, self.bits) if w.ndim > 1 else w).to(self.dtype)  # type: ignore[no-untyped-call]
            for n, w in latents.items()
        }

    def wire(self, latents: Tensors) -> dict[str, torch.Tensor]:
        sent: dict[str, torch.Tensor] = {}
        for n, w in latents.items():
            if w.ndim < 2:
                sent[n] = w.detach().to(self.dtype)
                continue
            whole, sent[f"{n}/scale"] = quantise(w.detach(), self.bits)
            sent[f"{n}/{self.kind}"] = pack_nibbles(whole) if self.bits == 4 else whole
        return sent

    def read(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        made = {}
        for n, shape in shapes.items():
            if len(shape) < 2:
                made[n] = fitting(n, _taken(wire, n), shape).to(self.dtype)
                continue
            size = prod(shape)
            blocks = -(-size // BLOCK)
            length = torch.Size([blocks * BLOCK // (2 if self.bits == 4 else 1)])
            whole = fitting(n, _taken(wire, f"{n}/{self.kind}"), length)
            scale = fitting(n, _taken(wire, f"{n}/scale"), torch.Size([blocks]))
            whole = unpack_nibbles(whole) if self.bits == 4 else whole
            made[n] = dequantise(whole, scale, shape).to(self.dtype)
        return made


class Factored(Compression):
    """Two factors B·A of rank r = ⌈share · min(out, in)⌉: the nearest such product (Eckart–Young)."""

    def __init__(self, dtype: torch.dtype, share: float) -> None:
        super().__init__(dtype)
        self.share = share

    def rank(self, shape: torch.Size) -> int:
        return max(1, -int(-self.share * min(shape) // 1))

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse factors that hold more numbers than the weights that they stand for."""
        weights = [s for s in shapes.values() if len(s) == 2]
        factors, whole = sum(self.rank(s) * sum(s) for s in weights), sum(prod(s) for s in weights)
        if factors >= whole:
            raise UserError(
                f"algorithm.keep_rank={self.share:g} makes factors of {factors:,} numbers from a middle of {whole:,}: "
                "nothing is saved; set it lower, at 0.5 or less for square weights"
            )

    def latents(self, weights: Tensors) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for n, w in weights.items():
            if w.ndim == 2:
                low = factors(w, self.rank(w.shape))
                made[f"{n}/A"], made[f"{n}/B"] = low.a, low.b
            else:
                made[n] = w.detach().float().clone()
        return made

    def render(self, latents: Tensors) -> dict[str, torch.Tensor]:
        return self._products({n: t.to(self.dtype) for n, t in latents.items()})

    def wire(self, latents: Tensors) -> dict[str, torch.Tensor]:
        return {n: t.detach().to(self.dtype) for n, t in latents.items()}

    def read(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        for n, s in shapes.items():
            parts = {f"{n}/A": (self.rank(s), s[1]), f"{n}/B": (s[0], self.rank(s))} if len(s) == 2 else {n: s}
            for part, shape in parts.items():
                fitting(part, _taken(wire, part), torch.Size(shape))
        return self._products(wire)

    def numbers(self, wire: Tensors, shapes: Mapping[str, torch.Size]) -> int:
        return sum(t.numel() for t in wire.values())

    def _products(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        made = {}
        for n, t in tensors.items():
            if n.endswith("/A"):
                weight = n.removesuffix("/A")
                made[weight] = (tensors[f"{weight}/B"].float() @ t.float()).to(self.dtype)
            elif not n.endswith("/B"):
                made[n] = t.to(self.dtype)
        return made


def make_compression(kind: str, dtype: torch.dtype, bits: int, share: float) -> Compression:
    """`kind` as in a recipe: drop_layers (weights as they are), quantize or low_rank."""
    makers: dict[str, Any] = {
        "drop_layers": lambda: Plain(dtype),
        "quantize": lambda: Quantised(dtype, bits),
        "low_rank": lambda: Factored(dtype, share),
    }
    made: Compression = makers[kind]()
    return made


@one_thread()
def factors(weight: torch.Tensor, rank: int) -> LowRank:
    """B√, √A of the leading `rank` singular directions of `weight` [out, in], fp32; computed in fp64."""
    u, s, vh = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)
    root = s[:rank].sqrt()
    low = LowRank(u[:, :rank] * root, root[:, None] * vh[:rank]).single()
    return LowRank(low.b.contiguous().to(weight.device), low.a.contiguous().to(weight.device))


def quantise(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole numbers [blocks · BLOCK] int8, scales [blocks] fp32) of a flattened weight; the last block is padded."""
    flat = weight.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(dim=1) / largest
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    whole = (blocks / safe[:, None]).round().clamp(-largest, largest).to(torch.int8)
    return whole.reshape(-1), scale


def dequantise(whole: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """s·q in fp32."""
    return (whole.view(-1, BLOCK).float() * scale[:, None]).reshape(-1)[: prod(shape)].view(shape)


def pack_nibbles(whole: torch.Tensor) -> torch.Tensor:
    """[n] int8 in −7 … 7 → [n / 2] uint8, two to a byte, the earlier one in the low half."""
    pairs = (whole.to(torch.int16) + 8).view(-1, 2)
    return (pairs[:, 0] | (pairs[:, 1] << 4)).to(torch.uint8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    pairs = packed.to(torch.int16)
    return (torch.stack([pairs & 15, pairs >> 4], dim=1) - 8).to(torch.int8).view(-1)


class _Rounded(torch.autograd.Function):
    """Quantised and back; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, bits: int) -> torch.Tensor:
        return dequantise(*quantise(weight, bits), weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def fitting(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`tensor`, or ValueError where its shape is not `shape`."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)} instead of {tuple(shape)}")
    return tensor


def _taken(wire: Tensors, name: str) -> torch.Tensor:
    if name not in wire:
        raise ValueError(f"{name} is missing among what travelled")
    return wire[name]
