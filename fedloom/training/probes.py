"""What only the model can tell of a recipe, asked before the first round: positions, packed batches, kernels, what spares.

Each tries the model on a few tokens at most, and returns a value or refuses with a sentence. Nothing is trained here.
"""

from __future__ import annotations

import logging

from fedloom.common.errors import UserError
from fedloom.models.adapters import AdaptedModel
from fedloom.models.forward import supports_chunks, supports_packing, supports_prefix
from fedloom.models.prefix_cache import no_prefix
from fedloom.models.recompute import can_recompute
from fedloom.recipe.recipe import Recipe
from fedloom.training.compiling import trouble
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
    """Whether batches are padding-free: on or off. Under auto the model is tried once."""
    if wanted == "off":
        return "off"
    if supports_packing(model):
        return "on"
    if wanted == "on":
        raise UserError("train.packing=on but this model does not keep packed sequences apart: use train.packing=auto")
    log.warning("this model does not keep packed sequences apart: batches are padded")
    return "off"


def check_sparing(recipe: Recipe, model: AdaptedModel, *, elsewhere: bool = False) -> None:
    """Refuse to train in less memory or time where the result would be another, or nothing is spared.

    Args:
        recipe: with its packing chosen.
        elsewhere: clients have devices of their own.
    """
    train = recipe.train
    why = can_recompute(model, train.packing == "on") if train.checkpointing else ""
    if why:
        raise UserError(f"train.checkpointing=true cannot be used: {why}; set train.checkpointing=false")
    if train.loss_chunk is not None and not supports_chunks(model):
        raise UserError(
            f"train.loss_chunk={train.loss_chunk} cannot be used: this model changes its logits after its head; leave it out"
        )
    if train.optimizer_offload == "cpu" and model.device.type == "cpu" and not elsewhere:
        raise UserError(
            "train.optimizer_offload=cpu but the model is on the CPU, and the optimiser's state with it: leave it out, or "
            "set train.optimizer_offload=disk"
        )
    if train.compile and not elsewhere:
        why = trouble(model, train, train.packing == "on")
        if why:
            raise UserError(f"train.compile=true cannot be used: {why}; set train.compile=false")
    if train.cache_prefix is not None:
        why = no_prefix(model, train.packing == "on")
        if not why and not supports_prefix(model):
            why = "this model's later layers need more than what the one before gives"
        if why:
            raise UserError(f"train.cache_prefix={train.cache_prefix} cannot be used: {why}; leave it out")


def check_positions(recipe: Recipe, model: AdaptedModel) -> None:
    """Refuse sequences that no longer fit in the model's positions once virtual tokens stand in front of them."""
    positions = getattr(model.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    longest, v = recipe.data.max_length, model.virtual_tokens
    if v and positions and longest + v > positions:
        raise UserError(
            f"data.max_length={longest} and {v} virtual tokens need {longest + v} positions, but the model has "
            f"{positions}: set data.max_length={positions - v} or fewer"
        )
