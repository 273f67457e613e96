"""Choose what only the model can tell of a recipe, before the first round: packed batches and kernels.

Each probe tries the model on a few tokens at most. Nothing is trained here.
"""

from __future__ import annotations

import logging

from fedloom.common.errors import UserError
from fedloom.models.adapters import AdaptedModel
from fedloom.models.forward import supports_packing
from fedloom.training.precision import autocast

log = logging.getLogger(__name__)


def settle_attention(wanted: str, model: AdaptedModel, precision: str) -> str:
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
    log.warning(f"{name} does not give this model's losses here: packed batches take sdpa")
    model.base.attention = "sdpa"
    return "sdpa"


def choose_packing(wanted: str, model: AdaptedModel) -> str:
    """Choose whether batches are padding-free: on or off. Under auto the model is tried once."""
    if wanted != "auto":
        return wanted
    if supports_packing(model):
        return "on"
    log.warning("this model does not keep packed sequences apart: batches are padded")
    return "off"
