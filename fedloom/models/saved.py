"""Results on disk: an adapter loaded to be used or merged, and the base delta that may lie beside it.

`AdaptedModel.save` writes a result; this file reads it, whoever wrote it: peft's adapters of other origin do as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from fedloom.common.errors import UserError
from fedloom.models.adapters import AdaptedModel, quiet_peft, save_model
from fedloom.models.attach import attach
from fedloom.models.loading import Base, load_base, load_config, load_tokenizer
from fedloom.models.quantised import dequantise_model
from fedloom.recipe.adapter import AdapterConfig
from fedloom.recipe.recipe import ModelConfig


def export_merged(config: ModelConfig, adapter: Path, folder: Path) -> None:
    """Write a plain transformers model with the adapter merged into its weights, and its tokenizer.

    Raises UserError for an adapter that is no change of weights.
    """
    merged = merge_adapter(config, adapter)
    save_model(merged.model, merged.tokenizer, folder)


def export_gguf(config: ModelConfig, adapter: Path, path: Path, dtype: str, name: str) -> None:
    """Write the merged model and its tokenizer as one GGUF file (models/gguf/model.py).

    Raises UserError for an adapter that is no change of weights and for what GGUF cannot hold; before anything is merged.
    """
    from fedloom.models.gguf.model import find_architecture, write_gguf
    from fedloom.models.gguf.vocabulary import Vocabulary

    check_mergeable(adapter)
    base = _model_config(config, adapter) if _is_model(adapter) else config
    settings = load_config(base)
    find_architecture(settings)
    vocabulary = Vocabulary.of(load_tokenizer(base), settings.vocab_size)
    write_gguf(merge_adapter(config, adapter).model, vocabulary, path, dtype, name)


def merge_adapter(config: ModelConfig, adapter: Path) -> Base:
    """The base with the adapter (and the base delta) in its weights.

    The adapter of a quantised base is merged into the weights that it was trained on: the dequantised ones.

    Raises UserError for an adapter that is no change of weights.
    """
    check_mergeable(adapter)
    config = allow_any_attention(config)
    if _is_model(adapter):
        return load_base(_model_config(config, adapter), "cpu")
    base = load_base(config, "cpu")
    dequantise_model(base.model, getattr(torch, config.dtype))
    delta = load_base_delta(adapter)
    with quiet_peft():
        merged: Any = PeftModel.from_pretrained(base.model, str(adapter), is_trainable=bool(delta))
    if delta:
        AdaptedModel(merged, base).set_base_delta(delta, into_weights=True)
    return replace(base, model=merged.merge_and_unload())


def check_mergeable(adapter: Path) -> None:
    """Raises UserError for an adapter that is no change of weights."""
    if _is_model(adapter):
        return
    kind = PeftConfig.from_pretrained(str(adapter))
    if kind.is_prompt_learning:
        raise UserError(
            f"{kind.peft_type.value.lower()} cannot be merged: its virtual tokens are no change of the model's "
            "weights; use --format peft"
        )


def load_adapted(config: ModelConfig, adapter: Path, device: str) -> AdaptedModel:
    """A base model with a saved adapter (a run's `adapter/` or any of peft's) and its base delta, where it has one.

    It is for use: where peft keeps a prompt without the network that made it, the prompt itself is the adapter.
    """
    config = allow_any_attention(config)
    if _is_model(adapter):
        return attach(load_base(_model_config(config, adapter), device), AdapterConfig(method="full"), 0)
    base = load_base(config, device)
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} holds no adapter: expected adapter_config.json, as `fedloom run` and peft write it")
    prompt = PeftConfig.from_pretrained(str(adapter)).is_prompt_learning
    with quiet_peft():
        module = PeftModel.from_pretrained(base.model, str(adapter), is_trainable=not prompt)
    if prompt:
        module.prompt_encoder.requires_grad_(True)
    module.eval()
    model = AdaptedModel(module, base)
    model.set_base_delta(load_base_delta(adapter))
    return model


def _is_model(folder: Path) -> bool:
    """Whether a result is a whole model (full fine-tuning), not an adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def allow_any_attention(config: ModelConfig) -> ModelConfig:
    """Allow another attention kernel where the one that the run trained with is not available."""
    return config if config.attention == "sdpa" else config.model_copy(update={"attention": "auto"})


def _model_config(config: ModelConfig, folder: Path) -> ModelConfig:
    return config.model_copy(update={"name": str(folder), "revision": None, "quantization": None})


BASE_DELTA = "base_delta.safetensors"


def save_base_delta(folder: Path, delta: Mapping[str, torch.Tensor]) -> None:
    """Beside the adapter that it belongs to."""
    save_file({n: t.contiguous() for n, t in delta.items()}, str(folder / BASE_DELTA))


def load_base_delta(folder: Path) -> dict[str, torch.Tensor] | None:
    path = folder / BASE_DELTA
    return load_file(str(path)) if path.is_file() else None
