"""PEFT methods: the peft configuration of each, and the keys of a recipe's `adapter` section that fill it.

A new method of peft is one line of the table. This file does not import peft; models/adapters.py builds the method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fedloom.common.errors import suggest
from fedloom.recipe.sections import Section


@dataclass(frozen=True)
class Method:
    """A way to make a model trainable.

    Attributes:
        config: the name of peft's configuration class; None if peft is not used.
        arguments: argument of that class → the key of `adapter` with its value.
        also: further keys of `adapter` that belong to the method.
        fixed: arguments that are always the same.
        defaults: key of `adapter` → the value that null means for this method.
    """

    config: str | None
    arguments: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """The keys of `adapter` that belong to this method."""
        return frozenset(self.arguments.values()) | frozenset(self.also)


_LORA = {"lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}


_PLAIN_LORA = {**_LORA, "r": "rank", "use_rslora": "rslora", "use_dora": "dora", "bias": "bias"}


_ADALORA = {**_LORA, "init_r": "rank", "target_r": "rank", "orth_reg_weight": "orthogonality"}


_IA3 = {"target_modules": "target_modules", "feedforward_modules": "feedforward_modules"}


_PROMPT = {"num_virtual_tokens": "virtual_tokens"}


_ENCODED = {**_PROMPT, "encoder_hidden_size": "encoder_hidden_size"}


_PREFIX = {**_ENCODED, "prefix_projection": "prefix_projection"}


_START = ("init", "init_text")


_EVERY_LINEAR = {"target_modules": "all-linear"}


_NO_ALLOCATION = {"total_step": 1}  # peft wants to know when ranks are allocated: never (docs/peft-methods.md)


METHODS: dict[str, Method] = {
    "lora": Method("LoraConfig", _PLAIN_LORA, also=("ranks", "layers"), defaults=_EVERY_LINEAR),
    "adalora": Method("AdaLoraConfig", _ADALORA, also=("layers",), fixed=_NO_ALLOCATION, defaults=_EVERY_LINEAR),
    "ia3": Method("IA3Config", _IA3),
    "prompt_tuning": Method("PromptTuningConfig", _PROMPT, also=_START),
    "p_tuning": Method("PromptEncoderConfig", _ENCODED),
    "prefix_tuning": Method("PrefixTuningConfig", _PREFIX, also=_START),
    "full": Method(None, also=("layers",)),
}


class AdapterConfig(Section):
    """The trainable part of the model. Each key belongs to some of the methods; the table says which."""

    method: str = Field("lora", description=f"the PEFT method: {', '.join(METHODS)}")
    rank: int = Field(8, ge=1, description="LoRA's rank r; under adalora the fixed budget of every module")
    ranks: dict[str, Annotated[int, Field(ge=1)]] | Literal["by device"] | None = Field(
        None,
        description="client → its own rank, at most `rank`, for algorithms that take mixed ranks; others have `rank`; "
        "`by device` gives each client the rank of its device's class (docs/devices.md)",
    )
    alpha: float = Field(16.0, gt=0, description="LoRA's α; its scale is α/r, the same for clients of a lower rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout on the adapter's input (lora, adalora)")
    target_modules: str | list[str] | None = Field(
        None,
        description="module names that get an adapter, or all-linear for every linear layer but the head; null is "
        "all-linear for lora and adalora, and peft's choice for the architecture for ia3",
    )
    layers: list[Annotated[int, Field(ge=0)]] | str | None = Field(
        None,
        description="decoder layers that train, counted from 0, as a list or as last-N (lora, adalora, full); null: all",
    )
    rslora: bool = Field(False, description="lora: scale by α/√r instead of α/r")
    dora: bool = Field(False, description="lora: learn each weight's magnitude and its direction (DoRA)")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="lora: which of the base's biases train too: none, all, or those of adapted modules"
    )
    orthogonality: float = Field(
        0.1, ge=0, description="adalora: weight γ of the term that keeps its two factors orthogonal"
    )
    feedforward_modules: list[str] | None = Field(
        None, description="ia3: those of target_modules whose input is scaled, not the output; null is peft's choice"
    )
    virtual_tokens: int = Field(20, ge=1, description="length of the prompt or prefix (prompt, prefix and p_tuning)")
    init: Literal["vocabulary", "text", "random"] = Field(
        "vocabulary",
        description="initial virtual tokens (prompt and prefix tuning): tokens drawn from the vocabulary, those of "
        "init_text, or small random numbers; a prefix starts as the base's keys and values for them",
    )
    init_text: str | None = Field(
        None, min_length=1, description="the text of init=text; repeated or cut to virtual_tokens"
    )
    prefix_projection: bool = Field(
        False, description="prefix_tuning: train a small network that computes the prefix, not the prefix itself"
    )
    encoder_hidden_size: int | None = Field(
        None,
        ge=1,
        description="width of the network that computes the prompt (p_tuning, and prefix_tuning with prefix_projection); "
        "null is the model's width",
    )

    @property
    def trains_base(self) -> str:
        """The setting that makes weights of the base itself train; empty if none does."""
        if self.method == "full":
            return "method=full"
        return "" if self.bias == "none" else f"bias={self.bias}"

    def rank_of(self, client: str) -> int:
        """Return a client's own rank."""
        assert not isinstance(self.ranks, str), "`by device` is resolved to ranks before training"
        return (self.ranks or {}).get(client, self.rank)

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        method = METHODS.get(values.get("method", "lora"))
        return {**values, **{k: v for k, v in method.defaults.items() if values.get(k) is None}} if method else values

    @field_validator("method")
    @classmethod
    def _check_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"unknown adapter.method {value!r}: {suggest(value, METHODS)}")
        return value

    @model_validator(mode="after")
    def _check_keys(self) -> AdapterConfig:
        own = METHODS[self.method].keys
        for key, info in type(self).model_fields.items():
            if key != "method" and key not in own and getattr(self, key) != info.default:
                takers = ", ".join(name for name, method in METHODS.items() if key in method.keys)
                raise ValueError(
                    f"adapter.{key} belongs to {takers}, not to adapter.method={self.method}: leave it out"
                    + (f" ({self.method} has {', '.join(sorted(own))})" if own else "")
                )
        return self

    @model_validator(mode="after")
    def _check_options(self) -> AdapterConfig:
        if self.init == "text" and self.init_text is None:
            raise ValueError("adapter.init=text needs a text: set adapter.init_text")
        if self.init_text is not None and self.init != "text":
            raise ValueError(f"adapter.init_text is set but adapter.init={self.init}: set adapter.init=text as well")
        if self.prefix_projection and self.init != "vocabulary":
            raise ValueError(
                f"adapter.init={self.init} cannot be used with adapter.prefix_projection=true, whose network computes the "
                "prefix from random numbers: leave one of them out"
            )
        if self.method == "prefix_tuning" and self.encoder_hidden_size and not self.prefix_projection:
            raise ValueError("adapter.encoder_hidden_size needs adapter.prefix_projection=true under prefix_tuning")
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> AdapterConfig:
        """Check the form only; models/layers.py checks the model's number of layers."""
        if isinstance(self.layers, str) and not re.fullmatch(r"last-[1-9]\d*", self.layers):
            raise ValueError(
                f"adapter.layers={self.layers!r} is not valid: set a list of numbers, or last-4 and the like"
            )
        if self.layers is not None and not self.layers:
            raise ValueError("adapter.layers=[] leaves nothing to train: name a layer, or leave it out")
        if self.layers is not None and self.bias == "all":
            raise ValueError(
                "adapter.bias=all trains every layer's biases, whatever adapter.layers says: use lora_only"
            )
        return self

    @model_validator(mode="after")
    def _check_ranks(self) -> AdapterConfig:
        own = {} if isinstance(self.ranks, str) else self.ranks or {}
        high = {c: r for c, r in own.items() if r > self.rank}
        if high:
            client, rank = next(iter(high.items()))
            raise ValueError(
                f"adapter.ranks gives {client} the rank {rank}, more than adapter.rank={self.rank}: raise adapter.rank"
            )
        return self
