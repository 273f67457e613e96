"""Which kernel packed batches of a model attend with, once that was tried on the device that trains.

A simulation asks before its first round, a site before its first assignment. What can be had at all, the model's loading
has decided (models/gpu_attention.py). This file does not know recipes.
"""

from __future__ import annotations

from collections.abc import Callable

from fedloom.errors import UserError
from fedloom.models.adapters import AdaptedModel
from fedloom.models.forward import supports_packing
from fedloom.training.precision import autocast


def settle_attention(wanted: str, model: AdaptedModel, precision: str, say: Callable[[str], None]) -> str:
    """What packed batches attend with, once the model was tried: under auto per-segment SDPA where a kernel is off.

    Args:
        precision: that training will have, chosen: fp32, bf16 or fp16.
    """
    name = model.base.attention
    if name == "sdpa":
        return name
    with autocast(model.device, precision):
        if supports_packing(model):
            return name
    if wanted != "auto":
        raise UserError(f"model.attention={wanted} does not give this model's losses here: set model.attention=sdpa")
    say(f"{name} does not give this model's losses here: packed batches take sdpa")
    model.base.attention = "sdpa"
    return "sdpa"
