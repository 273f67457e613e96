"""A model as one GGUF file, for llama.cpp and programs built on it: architecture, tokenizer, tensors.

The `gguf` library has the file format, the tensors' names and the quantised types. This file knows which architecture
of
llama.cpp a transformers model has, and how its tensors differ there:

- llama.cpp's `llama` rotates neighbouring numbers of a query or key (2i, 2i+1). transformers rotates the i-th of the
  first half with the i-th of the second half. So the rows of q and k are reordered within each head. `qwen2` and
  `qwen3`
  of llama.cpp rotate as transformers does, and their rows stay.
- A scaled rotation is written as one factor per frequency: the plain rotation's frequency over the model's own.
- An output layer that shares the embedding's weights is left out.

Tensors are converted one after another. This file does not know about adapters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel

from fedloom.common.errors import UserError
from fedloom.models.gguf.vocabulary import Vocabulary

#: Name on the command line → (type of matrices, llama.cpp's number of the file type). Vectors are always f32.
DTYPES = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        name: llama.cpp's.
        permuted: whether rows of q and k are reordered.
        scaled: whether it reads factors of a scaled rotation.
        biases: names of the layers that may have a bias.
    """

    name: gguf.MODEL_ARCH
    permuted: bool
    scaled: bool
    biases: tuple[str, ...]


_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


_LLAMA = Architecture(gguf.MODEL_ARCH.LLAMA, permuted=True, scaled=True, biases=_ALL)


#: transformers' `model_type` → llama.cpp's architecture.
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, permuted=False, scaled=False, biases=_ALL[:3]),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, permuted=False, scaled=False, biases=()),
}


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """Return llama.cpp's architecture for a model.

    Raises UserError if there is none, or if it computes something else.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UserError(
            f"a model of type {config.model_type} cannot be written as GGUF, only {', '.join(ARCHITECTURES)}: use "
            "--format merged, and llama.cpp's own converter"
        )
    rotation = config.rope_parameters["rope_type"]
    if rotation not in (("default", "linear", "llama3") if found.scaled else ("default",)):
        raise UserError(
            f"the rotation {rotation!r} of this {config.model_type} model cannot be written as GGUF: use "
            "--format merged, and llama.cpp's own converter"
        )
    if config.hidden_act != "silu":
        raise UserError(
            f"llama.cpp's {gguf.MODEL_ARCH_NAMES[found.name]} uses the activation silu, but this model uses "
            f"{config.hidden_act}: use --format merged"
        )
    return found


def write_gguf(model: PreTrainedModel, vocabulary: Vocabulary, path: Path, dtype: str, name: str) -> None:
    """Write the model to a new file.

    Args:
        model: with plain weights, without adapters.
        vocabulary: of its tokenizer.
        path: of the file.
        dtype: of the matrices, a name in DTYPES.
        name: the model's name in the file.

    Raises:
        UserError: llama.cpp has no such architecture, or `dtype` cannot represent a weight.
        OSError: the disk has no room for the file.
    """
    found = find_architecture(model.config)
    tensors = list(_tensors(model, found, DTYPES[dtype][0]))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[found.name])
    try:
        _write_settings(writer, model, dtype, name)
        vocabulary.write(writer)
        for tensor in tensors:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _reserve_disk(writer)
        for tensor in tensors:
            writer.write_tensor_data(_encode(tensor))
    finally:
        writer.close()


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file; `load` returns its fp32 numbers when they are needed."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    load: Callable[[], torch.Tensor]


def _tensors(model: PreTrainedModel, found: Architecture, kind: Kind) -> Iterator[_Tensor]:
    config: Any = model.config
    names = gguf.get_tensor_name_map(found.name, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    factors = _rotation_factors(model)
    if factors is not None:
        yield _Tensor("rope_freqs.weight", tuple(factors.shape), Kind.F32, lambda: factors)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, what = name.rpartition(".")
        layer = stem.rpartition(".")[2]
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None or (what == "bias" and layer not in found.biases):
            raise UserError(
                f"llama.cpp's {gguf.MODEL_ARCH_NAMES[found.name]} has no place for {name}: use --format merged"
            )
        count = heads.get(layer) if found.permuted else None
        yield _Tensor(written, tuple(tensor.shape), _choose_kind(tensor, kind), partial(_reorder_rows, tensor, count))


def _choose_kind(tensor: torch.Tensor, wanted: Kind) -> Kind:
    """Return a tensor's type: f32 for vectors, f16 for rows that are no multiple of the block size."""
    if tensor.dim() == 1:
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else Kind.F16


def _reorder_rows(tensor: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Return the tensor in fp32, [heads·d, …].

    With `heads`, each head's rows are in the order 0, d/2, 1, d/2 + 1 … instead of 0, 1, 2 …
    """
    tensor = tensor.detach().float().cpu()
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)  # [heads, half, d/2, in]
    return halves.transpose(1, 2).reshape(tensor.shape)


def _rotation_factors(model: Any) -> torch.Tensor | None:
    """Return the factors [d/2] by which llama.cpp divides the plain frequencies; None for a plain rotation."""
    rotary = model.model.rotary_emb
    plain, _ = rotary.compute_default_rope_parameters(model.config)
    own = rotary.inv_freq.float().cpu()
    return None if torch.equal(plain, own) else plain / own


def _encode(tensor: _Tensor) -> NDArray[np.uint8]:
    numbers = tensor.load().contiguous().numpy()
    with np.errstate(over="ignore"):
        data: NDArray[Any] = gguf.quantize(numbers, tensor.kind)
    if tensor.kind == Kind.F16 and not np.isfinite(data).all():
        raise UserError(f"{tensor.name} has numbers that are too large for f16: use --dtype bf16 or f32")
    return data.view(np.uint8)


def _write_settings(writer: gguf.GGUFWriter, model: PreTrainedModel, dtype: str, name: str) -> None:
    """Write the model's settings, which llama.cpp reads before the tensors."""
    config: Any = model.config
    positions, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(DTYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    # llama.cpp has no window here; up to the window's length it makes no difference.
    writer.add_context_length(min(positions, window) if window else positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _reserve_disk(writer: gguf.GGUFWriter) -> None:
    """Reserve disk space for the tensors, so that a full disk is reported before they are converted."""
    (file,), (tensors,) = writer.fout, writer.tensors
    pad = partial(writer.ggml_pad, n=writer.data_alignment)
    os.posix_fallocate(file.fileno(), 0, pad(file.tell()) + sum(pad(t.nbytes) for t in tensors.values()))
