"""A decoder as a message: its configuration, its tokenizer's files, and of its tensors those that may leave.

The receiver builds a skeleton on the meta device, which takes no memory, cuts it like the sender's emulator and fills it
from the message, strictly by name: it asks no folder, cache or hub for anything. Files travel as uint8 tensors, since a
tokenizer is larger than a message's metadata may be. Tied weights travel once, under the first of their names. This file
does not know who sends, nor how the middle's weights were compressed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedloom.common.errors import UserError
from fedloom.models.attention import packed as attention
from fedloom.models.emulator.cut import Cut, thin
from fedloom.models.loading import Base, quiet_transformers

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer/"


Tensors = Mapping[str, torch.Tensor]


def check_shippable(model: PreTrainedModel) -> None:
    """Refuse an architecture that transformers itself does not have: code does not travel."""
    kind = model.config.model_type
    if kind not in CONFIG_MAPPING or type(model) not in AutoModelForCausalLM._model_mapping.values():
        raise UserError(
            f"{type(model).__name__} is no architecture of transformers itself, and a client that builds the model from a "
            "message gets no code: use another model, or an algorithm whose clients hold the model"
        )


def files_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """File name → its bytes as a uint8 tensor."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in {"_name_or_path", "transformers_version"}}
    made = {CONFIG: json.dumps(config).encode()}
    if model.generation_config is not None:
        made[GENERATION] = model.generation_config.to_json_string(use_diff=True).encode()
    return as_tensors(made | tokenizer_files(tokenizer))


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """File name → its bytes: what `tokenizer_of` needs."""
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        tokenizer.save_pretrained(scratch)
        paths = sorted(p for p in Path(scratch).rglob("*") if p.is_file())
        return {TOKENIZER + p.relative_to(scratch).as_posix(): p.read_bytes() for p in paths}


def as_tensors(files: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """Files as they travel in a payload."""
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()}


def tensor_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of what a model needs besides its code: parameters, tied ones once, and buffers that are saved."""
    parameters = [n for n, _ in model.named_parameters()]
    saved = set(model.state_dict())
    return (*parameters, *(n for n, _ in model.named_buffers() if n in saved))


def tokenizer_of(files: Tensors) -> PreTrainedTokenizerBase:
    """The tokenizer in a message. Raises ValueError for a file name that leads elsewhere."""
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        for name, tensor in files.items():
            if not name.startswith(TOKENIZER):
                continue
            relative = PurePosixPath(name.removeprefix(TOKENIZER))
            if relative.is_absolute() or ".." in relative.parts or not relative.parts:
                raise ValueError(f"a tokenizer's file is called {name!r}, which leads out of its folder")
            path = Path(scratch) / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_as_bytes(tensor))
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(scratch, local_files_only=True)
    made.padding_side = "left"
    return made


def skeleton(files: Tensors, cut: Cut, dtype: torch.dtype) -> PreTrainedModel:
    """The emulator's model without a single weight: parameters on the meta device, computed buffers in place."""
    values = json.loads(_as_bytes(files[CONFIG]))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with quiet_transformers():
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
        model.config._attn_implementation = attention.plain(model)
        if GENERATION in files and model.generation_config is not None:
            model.generation_config = type(model.generation_config).from_dict(json.loads(_as_bytes(files[GENERATION])))
    thin(model, cut)
    return model


def fill(model: PreTrainedModel, tensors: Tensors, files: Tensors, device: str) -> Base:
    """Put `tensors` into a skeleton, strictly by name. Raises ValueError that lists what is missing or foreign."""
    names = set(tensor_names(model))
    wanted = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if n in names}
    missing, foreign = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or foreign:
        raise ValueError(f"the message does not fill the model; missing: {missing[:5]}, unexpected: {foreign[:5]}")
    for name, empty in wanted.items():
        if tensors[name].shape != empty.shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)} instead of {tuple(empty.shape)}")
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        # A copy: alignment in torch's allocator, and nothing of the message stays referenced.
        value = tensors[name].to(device, empty.dtype, copy=True)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value
    model.tie_weights()
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise ValueError(f"the message left {left[:5]} of the model empty")
    model.requires_grad_(False)
    return Base(model.eval().to(device), tokenizer_of(files), "built from the server's message")


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
