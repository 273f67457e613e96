"""Choose packed batches and attention kernels for a model, before the first round.

Each probe runs the model on a few tokens at most. Nothing is trained here.
"""

from __future__ import annotations

import logging

from fedloom.common.errors import UserError
from fedloom.models.adapters import AdaptedModel
from fedloom.models.forward import supports_packing
from fedloom.training.precision import autocast

log = logging.getLogger(__name__)


def settle_attention(wanted: str, model: AdaptedModel, precision: str) -> str:
    """Choose the attention of packed batches. Under auto, per-segment SDPA replaces a kernel that gives wrong losses.

    Args:
        precision: of training, already chosen: fp32, bf16 or fp16.
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
    """Choose whether batches are padding-free: on or off. Under auto the model is checked once."""
    if wanted != "auto":
        return wanted
    if supports_packing(model):
        return "on"
    log.warning("this model does not keep packed sequences apart: batches are padded")
    return "off"
