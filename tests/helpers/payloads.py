"""Payloads of every kind that travels, and chains to send them through."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from fedloom.common import registry
from fedloom.messages.operators.chain import Chain
from fedloom.messages.types import Payload

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OTHERS = [
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
SHAPES = [(), (0,), (1,), (3, 5), (2, 0, 4), (2, 3, 4), (257,), (40, 30)]

#: Every registered operator with options that matter.
LOSSLESS: list[Any] = ["deflate", {"name": "deflate", "level": 1}, "gzip", "zstd", "lz4", "delta"]
LOSSY: list[Any] = [
    "bf16", "fp16", {"name": "cast", "dtype": "fp16"},
    *({"name": "quantize", "bits": b, "block": n} for b in (8, 4, 2, "ternary") for n in (256, 8)),
    *({"name": "quantize", "bits": b, "rounding": "stochastic"} for b in (8, 4, "ternary")),
    *({"name": "sparsify", "fraction": f} for f in (0.001, 0.02, 0.3, 1.0)), {"name": "sparsify", "method": "random_k"},
    {"name": "sparsify", "method": "random_k", "fraction": 0.4, "rescale": True},
]  # fmt: skip


def name_of(described: Any) -> str:
    return described if isinstance(described, str) else ",".join(f"{v}" for v in described.values())


def of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Random numbers, for integers random bits."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in FLOATS:
        return (torch.randn(shape, generator=generator) * spread).to(dtype)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = int(torch.tensor(shape).prod()) if shape else 1
    data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(
        (a[n].dtype, a[n].shape, bits(a[n])) == (b[n].dtype, b[n].shape, bits(b[n])) for n in a
    )


@st.composite
def tensors(draw: st.DrawFn, *, finite: bool = True) -> torch.Tensor:
    """Of any dtype and shape; sometimes a window, a transposed or a strided view; denormal, equal and extreme numbers."""
    dtype = draw(st.sampled_from(FLOATS * 2 + OTHERS))
    shape = draw(st.sampled_from(SHAPES))
    spread = draw(st.sampled_from([1.0, 1e-3, 1e-42, 1e4, 0.0]))
    made = of(dtype, shape, draw(st.integers(0, 9)), spread)
    if dtype in FLOATS and made.numel() > 2 and draw(st.booleans()):
        flat = made.view(-1)
        flat[0], flat[1] = 0.25, -0.0
        flat[2] = 1e-45 if finite else draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    if dtype is torch.float16:
        made = torch.where(torch.isinf(made), 6e4, made) if finite else made
    kind = draw(st.sampled_from(["plain", "transposed", "strided", "window"]))
    if kind == "transposed" and made.dim() > 1:
        made = made.transpose(0, 1)
    if kind == "strided" and made.dim() and dtype not in {torch.float8_e4m3fn, torch.uint64}:
        made = torch.stack([made, made], -1)[..., 0]
    if kind == "window" and made.dim() == 1 and len(made) > 1:
        made = made[1:]
    return made


def payloads(*, finite: bool = True) -> st.SearchStrategy[Payload]:
    name = st.sampled_from(["a", "b.lora_A.weight", "layers.10.x", "layers.9.x", "ü", ""])
    return st.builds(Payload, st.dictionaries(name, tensors(finite=finite), max_size=4), st.just({"note": [1, "x"]}))


def chain_of(*described: Any) -> Chain:
    return Chain.parse(described)


@st.composite
def chains(draw: st.DrawFn, steps: list[Any] = LOSSLESS + LOSSY) -> Chain:
    """A random chain in an order that a recipe may name."""
    from fedloom.common.errors import UserError

    described: list[Any] = []
    for step in draw(st.lists(st.sampled_from(steps), max_size=5)):
        try:
            Chain.parse([*described, step])
        except UserError:
            continue
        described.append(step)
    return Chain.parse(described)


def registered() -> set[str]:
    return set(registry.operators.names())
