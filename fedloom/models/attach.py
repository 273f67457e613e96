"""An adapter put into a base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import peft
import torch
from peft import PeftConfig, get_peft_model

from fedloom.common.errors import UserError
from fedloom.common.randomness import fork_torch
from fedloom.models import virtual_tokens as virtual
from fedloom.models.adapters import AdaptedModel, quiet_peft
from fedloom.models.layers import layer_prefixes, restrict_targets
from fedloom.models.loading import Base, load_base
from fedloom.recipe.adapter import METHODS, AdapterConfig
from fedloom.recipe.recipe import ModelConfig


def peft_config(config: AdapterConfig, width: int) -> PeftConfig:
    """peft's configuration of the recipe's method (the table in recipe/adapter.py). `width`: of the model's embeddings."""
    method = METHODS[config.method]
    assert method.config is not None
    arguments = {name: getattr(config, key) for name, key in method.arguments.items()}
    if "encoder_hidden_size" in arguments:
        arguments["encoder_hidden_size"] = arguments["encoder_hidden_size"] or width
    return getattr(peft, method.config)(task_type="CAUSAL_LM", **arguments, **method.fixed)


def attach(base: Base, config: AdapterConfig, seed: int, within: Sequence[str] | None = None) -> AdaptedModel:
    """`base` with a fresh adapter, initialised from the seed. Raises UserError where peft refuses the configuration.

    Args:
        within: prefixes of tensor names (``model.layers.0.``): nothing outside of them trains. Full fine-tuning or LoRA.
    """
    if config.trains_base and base.model.dtype != torch.float32:
        raise UserError(
            f"adapter.{config.trains_base} trains weights of the base, which are {base.model.dtype} here: "
            "set model.dtype=float32"
        )
    within = layer_prefixes(base.model, config.layers, within)
    if config.method == "full":
        for name, parameter in base.model.named_parameters():
            parameter.requires_grad_(within is None or name.startswith(tuple(within)))
        return AdaptedModel(base.model.eval(), base)
    if within is not None:
        config = config.model_copy(
            update={"target_modules": restrict_targets(base.model, config.target_modules, within)}
        )
    try:
        with fork_torch(seed, "init"), quiet_peft():
            width = base.model.get_input_embeddings().weight.shape[1]
            module = get_peft_model(base.model, peft_config(config, width))
            virtual.initialise(module, base, config)
    except ValueError as error:
        first = str(error).splitlines()[0]
        what = (
            f"adapter.target_modules={config.target_modules!r}"
            if config.target_modules
            else f"adapter.method={config.method}"
        )
        raise UserError(f"{what} does not fit this model: {first}") from error
    module.eval()
    return AdaptedModel(module, base)


@dataclass
class Models:
    """What a process can make of one base model: loaded once, adapted once, shared by server and clients.

    An algorithm asks for what it needs: most want `adapted()`; one whose clients never hold the full model (FedOT)
    takes the configuration alone.

    Attributes:
        finish: what is done to an adapted model before anybody has it, such as sharding its base among ranks
            (sharding.py). The base is loaded and adapted on the CPU then, and `finish` moves it.
    """

    model: ModelConfig
    adapter: AdapterConfig
    seed: int
    device: str = "cpu"
    finish: Callable[[AdaptedModel], AdaptedModel] | None = None
    _base: Base | None = None
    _adapted: AdaptedModel | None = None

    def base(self) -> Base:
        if self._base is None:
            self._base = load_base(self.model, "cpu" if self.finish else self.device, self.device)
        return self._base

    def adapted(self, config: AdapterConfig | None = None, within: Sequence[str] | None = None) -> AdaptedModel:
        """The base with an adapter in it, the recipe's own unless an algorithm needs another (twice the rank, say).

        The same object at every call: an algorithm's two halves ask for the same adapter. `within` as in `attach`.
        """
        if self._adapted is None:
            made = attach(self.base(), config or self.adapter, self.seed, within)
            self._adapted = self.finish(made) if self.finish else made
        return self._adapted

    def with_adapted(self, adapted: AdaptedModel) -> Models:
        """The same base, with another live adapter in it."""
        return replace(self, _base=self.base(), _adapted=adapted)
