"""A decoder's layers as code that torch compiles for this machine (`train.compile`), in training's own passes.

What is compiled is one layer, and all that are like it run the same code; the whole model in one piece would be the
code of every layer. Nothing that changes in a run is part of that code:

    lengths      how many tokens a batch has is a symbol, so one compilation serves every batch
    segments     attention of packed batches stays as it is (models/attention/packed.py): their number would be part
    of the code adapters     are swapped and stepped in place, so neither a client nor a round compiles anything
    dropout      draws the masks that it draws without recomputing  `train.checkpointing` calls the compiled layer
    again

Evaluation, generation and whatever else needs no gradients stay as they are, and so does a layer whose input needs none
(the first one, and those below the first that trains): each would be further code, and further time until the first step.
torch looks at the lengths that it sees first and makes its code for the like of those. So a process compiles on one
made-up batch, always the same (`trouble`), before it trains: a resumed run has the code that it had before. This file does
not know clients, rounds or recipes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedloom.common import cache_folder
from fedloom.common.environment import cpp_compiler
from fedloom.common.errors import UserError
from fedloom.common.randomness import fork_torch
from fedloom.data.batching import Batch, collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attention.packed import Opaque
from fedloom.models.forward import token_losses
from fedloom.models.layers import find_layers
from fedloom.models.recompute import plain_forward, save_memory
from fedloom.recipe.recipe import TrainConfig
from fedloom.training.precision import autocast

#: Lengths of the batch that code is made for.
LENGTHS = (96, 64)


#: Keywords of a layer whose values its attention alone looks at.
SEALED = ("segment_lengths", "prefix_states")


#: What makes the code; tests also take torch's stand-ins for it, which need no compiler.
BACKEND = "inductor"


#: How far a loss and a gradient may be from those of plain layers, relative: fp32, and 16 bits, which round in their order.
TOLERANCE, TOLERANCE_16 = 1e-3, 5e-2


#: Model → what its layers were compiled for, once that was found to be right.
_tried: WeakKeyDictionary[AdaptedModel, tuple[str, bool]] = WeakKeyDictionary()


@contextmanager
def compiled(model: AdaptedModel, wanted: bool = True) -> Iterator[None]:
    """In this block the model's layers run compiled, where a backward pass goes through them."""
    layers: list[Any] = list(find_layers(model.causal_lm)[1].children()) if wanted else []
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    if not (torch.is_grad_enabled() and hidden.requires_grad):  # below what trains, or the first layer: further code
        return type(layer).forward(layer, *args, **kwargs)
    code = _code(plain_forward(type(layer)))
    sealed = {name: Opaque(kwargs[name]) for name in SEALED if name in kwargs}
    call = partial(code, layer, **{**kwargs, **sealed})
    if (
        getattr(layer, "gradient_checkpointing", False) and layer.training
    ):  # from without: torch compiles none of it within
        return layer._gradient_checkpointing_func(call, *args)
    return call(*args)


@cache
def _code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` compiled, for all layers of one kind in this process. What torch keeps for later ones is the user's own."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder.cache_home() / "compiled"))
    options = {"options": {"fallback_random": True}} if BACKEND == "inductor" else {}
    made: Callable[..., Any] = torch.compile(forward, dynamic=True, backend=BACKEND, **options)  # type: ignore[call-overload]
    return made


def no_compiler(device: str) -> str:
    """Why nothing can be compiled for this device, as half a sentence with its mend; empty where it can."""
    if device.startswith("cuda"):
        there = importlib.util.find_spec("triton") is not None
        return "" if there else "on a GPU torch compiles with triton, which is not installed: pip install triton"
    wanted = cpp_compiler()
    if shutil.which(wanted):
        return ""
    return f"on a CPU torch compiles with {wanted}, which is not there: install it, or name a C++ compiler in CXX"


def trouble(model: AdaptedModel, config: TrainConfig, packed: bool) -> str:
    """Why this model's layers cannot train compiled, as half a sentence; empty where they can, and then they are compiled.

    One pass over a made-up batch, plain and compiled: loss and gradient have to be the same but for rounding.
    """
    settings = config.precision, packed
    if _tried.get(model) == settings:
        return ""
    if why := no_compiler(str(model.device)):
        return why
    if (
        model.prefixed and not packed
    ):  # transformers' cache is asked by the layer's number, which becomes part of the code
        return (
            "prefix tuning of padded batches would make code for each layer by itself; train.packing=on needs it once"
        )
    size = model.causal_lm.config.get_text_config().vocab_size
    draw = np.random.default_rng(0)
    sequences = [TokenSequence(draw.integers(3, size, n).astype(np.int32), 1) for n in LENGTHS]
    batch = collate(sequences, packed=packed, pad=3)
    try:
        loss, gradient = _pass(model, batch, config, False)
        found, same = _pass(model, batch, config, True)
    except UserError:
        return "its layers are not in one list"
    except RuntimeError as error:  # torch's own, of every kind, and a compiler's
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch cannot compile its layers ({lines[0].rstrip('.:')}); is the compiler whole, Python's headers with it?"
    tolerance = TOLERANCE if config.precision == "fp32" and model.causal_lm.dtype == torch.float32 else TOLERANCE_16
    off = float((same - gradient).norm() / gradient.norm())
    if not (abs(found - loss) <= tolerance * abs(loss) and off <= tolerance):
        return f"compiled layers do not give its gradient (it is off by {off:.1e})"
    _tried[model] = settings
    return ""


def _pass(model: AdaptedModel, batch: Batch, config: TrainConfig, compile: bool) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a made-up batch, all as it is in a step; nothing is left of it."""
    model.grad.zero_()
    model.module.train()
    try:
        with (
            fork_torch(0, "dropout"),
            save_memory(model, config.checkpointing, config.loss_chunk),
            compiled(model, compile),
            autocast(model.device, config.precision),
        ):
            loss = token_losses(model, batch).sum()
            with torch.autocast(loss.device.type, enabled=False):
                model.backward(loss)
        return float(loss.detach()), model.grad.clone()
    finally:
        model.module.eval()
        model.grad.zero_()
