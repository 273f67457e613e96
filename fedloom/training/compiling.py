"""Compile a decoder's layers with torch (`train.compile`), for training's forward and backward passes.

One layer is compiled, and all layers of its class run that code; compiling the whole model would compile every layer. The
code does not depend on anything that changes during a run:

    lengths       the number of tokens of a batch is a symbol, so one compilation serves every batch
    segments      attention of packed batches is not compiled (models/attention/packed.py), because the number of
                  segments would be part of the code
    adapters      are swapped and stepped in place, so neither a new client nor a new round compiles anything
    dropout       draws the same masks as without compiling
    recomputing   `train.checkpointing` calls the compiled layer again

Passes without gradients, such as evaluation and generation, are not compiled. Neither is a layer whose input needs no
gradient (the first one, and those below the first that trains). Each would need more code, and more time until the first
step. torch specialises its code for the first lengths that it gets. So a process compiles on one fixed synthetic batch
(`trouble`) before it trains, and a resumed run has the same code as before. This file does not know clients, rounds or
recipes.
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

#: Lengths of the synthetic batch's sequences, in tokens.
LENGTHS = (96, 64)


#: Keyword arguments of a layer that only its attention reads.
SEALED = ("segment_lengths", "prefix_states")


#: torch's compiler. Tests also use torch's debugging backends, which need no C++ compiler.
BACKEND = "inductor"


#: The largest relative difference of loss and gradient from plain layers, in fp32 and in 16 bits.
TOLERANCE, TOLERANCE_16 = 1e-3, 5e-2


#: Model → the settings that its compiled layers were checked with.
_tried: WeakKeyDictionary[AdaptedModel, tuple[str, bool]] = WeakKeyDictionary()


@contextmanager
def compiled(model: AdaptedModel, wanted: bool = True) -> Iterator[None]:
    """Within the block, the model's layers run compiled where a backward pass goes through them."""
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
    if not (torch.is_grad_enabled() and hidden.requires_grad):  # not compiled: see the top of this file
        return type(layer).forward(layer, *args, **kwargs)
    code = _code(plain_forward(type(layer)))
    sealed = {name: Opaque(kwargs[name]) for name in SEALED if name in kwargs}
    call = partial(code, layer, **{**kwargs, **sealed})
    if (
        getattr(layer, "gradient_checkpointing", False) and layer.training
    ):  # around the compiled code: torch does not compile checkpointing within it
        return layer._gradient_checkpointing_func(call, *args)
    return call(*args)


@cache
def _code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `forward` for all layers of one class in this process. torch's cache is in fedloom's cache folder."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder.cache_home() / "compiled"))
    options = {"options": {"fallback_random": True}} if BACKEND == "inductor" else {}
    made: Callable[..., Any] = torch.compile(forward, dynamic=True, backend=BACKEND, **options)  # type: ignore[call-overload]
    return made


def no_compiler(device: str) -> str:
    """Return why torch cannot compile for this device and how to fix it, as a clause; empty where it can."""
    if device.startswith("cuda"):
        there = importlib.util.find_spec("triton") is not None
        return "" if there else "on a GPU torch compiles with triton, which is not installed: pip install triton"
    wanted = cpp_compiler()
    if shutil.which(wanted):
        return ""
    return f"on a CPU torch compiles with {wanted}, which is not there: install it, or name a C++ compiler in CXX"


def trouble(model: AdaptedModel, config: TrainConfig, packed: bool) -> str:
    """Compile this model's layers. Returns why they cannot train compiled, as a clause; empty where they can.

    A synthetic batch runs through plain and compiled layers: loss and gradient must be equal up to rounding.
    """
    settings = config.precision, packed
    if _tried.get(model) == settings:
        return ""
    if why := no_compiler(str(model.device)):
        return why
    if model.prefixed and not packed:  # transformers' cache takes the layer's number, which becomes part of the code
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
    except RuntimeError as error:  # errors of torch, of every kind, and of the C++ compiler
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch cannot compile its layers ({lines[0].rstrip('.:')}); is the compiler whole, Python's headers with it?"
    tolerance = TOLERANCE if config.precision == "fp32" and model.causal_lm.dtype == torch.float32 else TOLERANCE_16
    off = float((same - gradient).norm() / gradient.norm())
    if not (abs(found - loss) <= tolerance * abs(loss) and off <= tolerance):
        return f"compiled layers do not give its gradient (it is off by {off:.1e})"
    _tried[model] = settings
    return ""


def _pass(model: AdaptedModel, batch: Batch, config: TrainConfig, compile: bool) -> tuple[float, torch.Tensor]:
    """Return loss and gradient of a synthetic batch, computed as in a step. The model is unchanged afterwards."""
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
