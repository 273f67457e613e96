"""A decoder as a message: its configuration, its tokenizer's files, and those tensors that may be sent.

The receiver builds a skeleton on the meta device, which takes no memory. It cuts the skeleton like the sender's
emulator
and fills it from the message, strictly by name; it reads no folder, cache or hub. Files are sent as uint8 tensors,
since
a tokenizer is larger than a message's metadata may be. Tied weights are sent once, under the first of their names. This
file does not know who sends, or how the middle's weights were compressed.
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
    """Raise UserError for an architecture that transformers itself does not have: code is not sent."""
    kind = model.config.model_type
    if kind not in CONFIG_MAPPING or type(model) not in AutoModelForCausalLM._model_mapping.values():
        raise UserError(
            f"{type(model).__name__} is no architecture of transformers itself, and a client that builds the model from a "
            "message gets no code: use another model, or an algorithm whose clients load the model themselves"
        )


def encode_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Return the files that describe the model: name → bytes as a uint8 tensor."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in {"_name_or_path", "transformers_version"}}
    made = {CONFIG: json.dumps(config).encode()}
    if model.generation_config is not None:
        made[GENERATION] = model.generation_config.to_json_string(use_diff=True).encode()
    return files_to_tensors(made | tokenizer_files(tokenizer))


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return the tokenizer's files: name → bytes. `decode_tokenizer` reads them."""
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        tokenizer.save_pretrained(scratch)
        paths = sorted(p for p in Path(scratch).rglob("*") if p.is_file())
        return {TOKENIZER + p.relative_to(scratch).as_posix(): p.read_bytes() for p in paths}


def files_to_tensors(files: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """Convert files to the uint8 tensors of a payload."""
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()}


def tensor_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the tensors that a model needs: parameters, tied ones once, and buffers that are saved."""
    parameters = [n for n, _ in model.named_parameters()]
    saved = set(model.state_dict())
    return (*parameters, *(n for n, _ in model.named_buffers() if n in saved))


def decode_tokenizer(files: Tensors) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a message. Raises ValueError for a file name outside the tokenizer's folder."""
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        for name, tensor in files.items():
            if not name.startswith(TOKENIZER):
                continue
            relative = PurePosixPath(name.removeprefix(TOKENIZER))
            if relative.is_absolute() or ".." in relative.parts or not relative.parts:
                raise ValueError(f"the tokenizer's file {name!r} leads out of the tokenizer's folder")
            path = Path(scratch) / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_as_bytes(tensor))
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(scratch, local_files_only=True)
    made.padding_side = "left"
    return made


def build_skeleton(files: Tensors, cut: Cut, dtype: torch.dtype) -> PreTrainedModel:
    """Build the emulator's model without weights: parameters on the meta device, computed buffers in place."""
    values = json.loads(_as_bytes(files[CONFIG]))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with quiet_transformers():
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
        model.config._attn_implementation = attention.default_attention(model)
        if GENERATION in files and model.generation_config is not None:
            model.generation_config = type(model.generation_config).from_dict(json.loads(_as_bytes(files[GENERATION])))
    thin(model, cut)
    return model


def fill_skeleton(model: PreTrainedModel, tensors: Tensors, files: Tensors, device: str) -> Base:
    """Put `tensors` into a skeleton, strictly by name. Raises ValueError that lists missing and unexpected names."""
    names = set(tensor_names(model))
    wanted = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if n in names}
    missing, foreign = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or foreign:
        raise ValueError(f"the message does not fill the model; missing: {missing[:5]}, unexpected: {foreign[:5]}")
    for name, empty in wanted.items():
        if tensors[name].shape != empty.shape:
            raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}, but must have {tuple(empty.shape)}")
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        # A copy is aligned by torch's allocator, and keeps no reference to the message.
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
    return Base(model.eval().to(device), decode_tokenizer(files), "built from the server's message")


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
