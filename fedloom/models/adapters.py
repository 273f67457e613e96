"""A base model with its trainable part: peft builds it, one flat buffer owns it.

The only file that imports peft. Every trainable parameter becomes a window into `adapter.flat` and its gradient a
window into `grad`, so that training, swapping and clipping are single operations on one tensor. This file does not
know who trains or what travels.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.config import AdapterConfig, ModelConfig
from fedloom.errors import UserError
from fedloom.models.loading import Base, Say, load_base, quiet_transformers
from fedloom.models.state import Adapter, Layout
from fedloom.randomness import forked_torch

#: PEFT method → peft's own configuration. A new method of peft is one line.
METHODS: dict[str, Callable[[AdapterConfig], PeftConfig]] = {
    "lora": lambda c: LoraConfig(
        r=c.rank,
        lora_alpha=c.alpha,  # peft's annotation says int; it divides by r
        lora_dropout=c.dropout,
        target_modules=c.target_modules,
        task_type="CAUSAL_LM",
    ),
}


class AdaptedModel:
    """A frozen base with one live adapter in it.

    Attributes:
        module: what is called: peft's model around the base.
        base: the base model and its tokenizer.
        adapter: the live adapter; writing into its flat buffer changes the model at once.
        grad: [numel], the gradient of `adapter.flat`.
        parameter: `adapter.flat` as one parameter with that gradient, for the optimiser.
        initial: [numel], the adapter as it was created from the seed.
    """

    def __init__(self, module: PeftModel, base: Base) -> None:
        self.module = module
        self.base = base
        trainable = {_plain(name): p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise UserError("nothing is trainable in this model: check adapter.target_modules")
        self.adapter = Adapter(Layout({n: p.shape for n, p in trainable.items()}), base.device)
        self.grad = torch.zeros_like(self.adapter.flat)
        gradients = self.adapter.layout.views(self.grad)
        with torch.no_grad():
            for name, view in self.adapter.views.items():
                view.copy_(trainable[name])
                trainable[name].data = view
                trainable[name].grad = gradients[name]  # autograd adds into it, in place
        self.parameter = torch.nn.Parameter(self.adapter.flat)
        self.parameter.grad = self.grad
        self.initial = self.adapter.flat.detach().clone()
        self._base_weights: dict[str, torch.Tensor] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer

    @property
    def device(self) -> torch.device:
        return self.adapter.flat.device

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model inside, whose configuration holds the attention function."""
        return self.base.model

    def initial_adapter(self) -> Adapter:
        """A CPU copy of the adapter as it was created from the seed."""
        adapter = Adapter(self.adapter.layout)
        adapter.flat.copy_(self.initial)
        return adapter

    def lora_scales(self) -> dict[str, float]:
        """Base weight → the scale s of its LoRA module (α/r, or α/√r under rsLoRA): W + s·B·A is what is computed."""
        scales = {}
        for name, module in self.base.model.named_modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and "default" in scaling:
                scales[f"{name}.weight"] = float(scaling["default"])
        return scales

    def base_weights(self) -> dict[str, torch.nn.Parameter]:
        """The base's own parameters, live, by their names in its state dict (the adapter's stand among them)."""
        return {_base_name(n): p for n, p in self.base.model.named_parameters()}

    def set_base_delta(self, delta: Mapping[str, torch.Tensor] | None) -> None:
        """Put the base weights to their loaded values plus `delta`; None puts them back.

        Args:
            delta: weight name as in the base model's state dict → what is added, dense [out, in], or the two factors
                ``name.B`` [out, r] and ``name.A`` [r, in] whose product is added. The sum is formed in fp32.

        Raises:
            ValueError: for a name that the base does not have, a shape that is not the weight's own, half a pair of
                factors, or a base whose weights are not floating point. The model is then as it was.
        """
        delta = delta or {}
        weights = self.base_weights()
        names = sorted({n.removesuffix(".A").removesuffix(".B") for n in delta})
        for name in names:
            _check_delta(name, weights.get(name), delta)
        for name, original in self._base_weights.items():
            weights[name].data.copy_(original)
        for name in names:
            change = delta[name] if name in delta else delta[f"{name}.B"].float() @ delta[f"{name}.A"].float()
            original = self._base_weights.setdefault(name, weights[name].detach().clone())
            weights[name].data.copy_(original.float() + change.to(original.device, torch.float32))

    def save(self, folder: Path, base_name: str) -> None:
        """Write the live adapter as peft's own format: `PeftModel.from_pretrained(base, folder)` loads it."""
        self.module.save_pretrained(str(folder))
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text())
        values["base_model_name_or_path"] = base_name
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _check_delta(name: str, weight: torch.Tensor | None, delta: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless `delta` has, for this weight, one dense tensor or one pair of factors that fits."""
    if weight is None:
        raise ValueError(f"the base has no weight {name}")
    if not weight.is_floating_point():
        raise ValueError(f"a base delta cannot be added to the quantised weight {name}")
    parts = {n: tuple(delta[n].shape) for n in (name, f"{name}.B", f"{name}.A") if n in delta}
    fits = parts == {name: tuple(weight.shape)}
    if list(parts) == [f"{name}.B", f"{name}.A"]:
        left, right = parts[f"{name}.B"], parts[f"{name}.A"]
        fits = len(left) == len(right) == 2 and left[1] == right[0] and (left[0], right[1]) == tuple(weight.shape)
    if not fits:
        raise ValueError(f"a base delta of {parts} does not fit the weight {name} {tuple(weight.shape)}")


def _plain(name: str) -> str:
    """peft's parameter name without the adapter's own name, as its saved files have it."""
    return name.replace(".default.", ".").removesuffix(".default")


def _base_name(name: str) -> str:
    """A base weight's name without the wrapper that peft put around its layer."""
    return name.replace(".base_layer.", ".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no word about a name of transformers that peft still asks by and that is on its way out."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def attach(base: Base, config: AdapterConfig, seed: int) -> AdaptedModel:
    """`base` with a fresh adapter, initialised from the seed. Raises UserError where peft refuses the configuration."""
    try:
        with forked_torch(seed, "init"), _quiet():
            module = get_peft_model(base.model, METHODS[config.method](config))
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"adapter.target_modules={config.target_modules!r} does not fit this model: {first}") from error
    module.eval()
    return AdaptedModel(module, base)


@dataclass
class Models:
    """What a process can make of one base model: loaded once, adapted once, shared by server and clients.

    An algorithm asks for what it needs: most want `adapted()`; one whose clients never hold the full model (FedOT)
    takes the configuration alone.
    """

    model: ModelConfig
    adapter: AdapterConfig
    seed: int
    device: str = "cpu"
    say: Say = lambda text: None
    _base: Base | None = None
    _adapted: AdaptedModel | None = None

    def base(self) -> Base:
        if self._base is None:
            self._base = load_base(self.model, self.device, self.say)
        return self._base

    def adapted(self, config: AdapterConfig | None = None) -> AdaptedModel:
        """The base with an adapter in it, the recipe's own unless an algorithm needs another (twice the rank, say).

        The same object at every call: an algorithm's two halves ask for the same adapter.
        """
        if self._adapted is None:
            self._adapted = attach(self.base(), config or self.adapter, self.seed)
        return self._adapted


def export_merged(config: ModelConfig, adapter: Path, folder: Path, say: Say = lambda text: None) -> None:
    """Write a plain transformers model with the adapter merged into its weights, and its tokenizer."""
    base = load_base(config, "cpu", say)
    delta = load_base_delta(adapter)
    with _quiet():
        merged: Any = PeftModel.from_pretrained(base.model, str(adapter))
    if delta:
        AdaptedModel(get_trainable(merged), base).set_base_delta(delta)
    merged = merged.merge_and_unload()
    with _quiet():
        merged.save_pretrained(str(folder))
    base.tokenizer.save_pretrained(str(folder))


def get_trainable(module: PeftModel) -> PeftModel:
    """A loaded adapter with its gradient switched on again (peft loads for inference)."""
    for name, parameter in module.named_parameters():
        if ".default" in name:
            parameter.requires_grad_(True)
    return module


def load_adapted(config: ModelConfig, adapter: Path, device: str, say: Say = lambda text: None) -> AdaptedModel:
    """A base model with a saved adapter (a run's `adapter/` or any of peft's) and its base delta, where it has one."""
    base = load_base(config, device, say)
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} holds no adapter: expected adapter_config.json, as `fedloom run` and peft write it")
    with _quiet():
        module = PeftModel.from_pretrained(base.model, str(adapter))
    module.eval()
    model = AdaptedModel(get_trainable(module), base)
    model.set_base_delta(load_base_delta(adapter))
    return model


BASE_DELTA = "base_delta.safetensors"


def save_base_delta(folder: Path, delta: Mapping[str, torch.Tensor]) -> None:
    """Beside the adapter that it belongs to."""
    save_file({n: t.contiguous() for n, t in delta.items()}, str(folder / BASE_DELTA))


def load_base_delta(folder: Path) -> dict[str, torch.Tensor] | None:
    path = folder / BASE_DELTA
    return load_file(str(path)) if path.is_file() else None
