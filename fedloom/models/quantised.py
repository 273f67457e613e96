"""A frozen base in 8 or 4 bits, for LoRA on top of it (QLoRA; Dettmers et al., arXiv 2305.14314).

    int8   each row of a weight as integers and one scale (vector-wise; Dettmers et al., arXiv 2208.07339)
    nf4    each block of 64 weights as 16 levels, quantiles of a normal distribution, times the block's largest weight
           (2305.14314, section 3 and appendix E; scales stay fp32, there is no second quantisation)

On a GPU bitsandbytes does this, through transformers. On a CPU the linear layer below does, with the same numbers: a
CPU
site computes with the same weights as a GPU site. A weight is dequantised for one product at a time, forward and again
backward, so the adapter's gradient is the one for the dequantised weights. Embeddings, head and norms are not
quantised.

No GPU has run this file yet. It does not know adapters.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from fedloom.common.errors import UserError

#: Weights of nf4 that share a scale, in the order of the flattened weight.
BLOCK = 64


#: The sixteen levels (2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


#: Byte → its two levels, the first in the high half.
_PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], dim=1)


def quantise(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight [out, in]: return (codes, fp32 scales).

    int8: codes [out, in] int8, scales [out, 1]. nf4: codes [blocks · 32] uint8, two weights per byte; scales [blocks,
        1].
    """
    weight = weight.detach().float()
    if kind == "int8":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return (weight / _avoid_zero(scale)).round().to(torch.int8), scale
    blocks = pad(weight.reshape(-1), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = torch.bucketize(blocks / _avoid_zero(scale), (NF4[1:] + NF4[:-1]) / 2, out_int32=True).view(-1, 2)
    return (nearest[:, 0] * 16 + nearest[:, 1]).to(torch.uint8), scale


def dequantise(codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the fp32 weight of `shape`. int8 codes have the weight's own shape; nf4 codes are flat."""
    if codes.dtype == torch.int8:
        return codes.float().mul_(scale)
    levels = _PAIRS.to(codes.device).index_select(0, codes.int())  # [bytes, 2]
    return levels.view(-1, BLOCK).mul_(scale).view(-1)[: shape.numel()].view(shape)


def _avoid_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that stores its weight as codes and scales. peft wraps it like any other linear layer."""

    scale: torch.Tensor

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        codes, scale = quantise(layer.weight, kind)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)

    def dequantise(self) -> torch.Tensor:
        """Return the weight [out, in], fp32."""
        return dequantise(self.weight, self.scale, torch.Size([self.out_features, self.in_features]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """The product x·Wᵀ. Backward dequantises the weight again instead of storing it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return linear(x, layer.dequantise().to(x.dtype))  # autocast may compute it in lower precision

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return (gradient @ ctx.layer.dequantise().to(gradient.dtype)).to(ctx.dtype), None


def quantise_model(model: Any, kind: str) -> None:
    """Replace every linear layer but the head by a quantised one, one layer after another.

    Raises UserError if the model has no such layer.
    """
    head = model.get_output_embeddings()
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if not found:
        raise UserError(
            f"model.quantization={kind} cannot be used with {type(model).__name__}, which has no torch linear layers: "
            "leave model.quantization out"
        )
    for name, layer in found:
        _replace_layer(model, name, QuantisedLinear(layer, kind))


def dequantise_model(model: Any, dtype: torch.dtype) -> None:
    """Replace the quantised layers by ordinary linear layers with the dequantised weights, in `dtype`."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantisedLinear)]:
        whole = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        whole.weight = nn.Parameter(layer.dequantise().to(dtype), requires_grad=False)
        whole.bias = layer.bias
        _replace_layer(model, name, whole)


def _replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def gpu_options(kind: str, dtype: torch.dtype, device: str) -> Mapping[str, Any]:
    """Return the arguments with which `from_pretrained` quantises by bitsandbytes.

    Raises UserError without bitsandbytes.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization={kind} on a GPU needs bitsandbytes: install fedloom[quantised], or set runtime.device=cpu"
        )
    import transformers

    bits = {"load_in_8bit": True} if kind == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": False,
    }  # fmt: skip
    return {"quantization_config": transformers.BitsAndBytesConfig(**bits), "device_map": {"": device}}


def linear_numel(layer: Any) -> int:
    """Return the number of weights of a linear layer, even if several share a byte."""
    if isinstance(layer, nn.Linear):
        return int(layer.in_features * layer.out_features)
    return int(layer.weight.numel())
