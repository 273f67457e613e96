"""A recipe's `train` section: a client's local training in a round.

Numbers and names only; training/ and the client use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fedloom.recipe.sections import Fraction, Section


class TrainConfig(Section):
    steps: int | None = Field(
        None, ge=1, description="optimiser steps of a client per round (8 if neither steps nor epochs is set)"
    )
    epochs: int | None = Field(None, ge=1, description="passes over a client's own data per round, instead of steps")
    batch_size: int = Field(8, ge=1, description="examples in one forward pass")
    accumulation: int = Field(1, ge=1, description="forward passes summed into one optimiser step")
    objective: Literal["sft", "dpo"] = Field(
        "sft",
        description="sft: learn the answers; dpo: prefer each answer to its rejected one, for data with both",
    )
    dpo_beta: float = Field(
        0.1, gt=0, description="dpo: β, the weight of a change from the base; a large β keeps the model near the base"
    )
    dpo_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo: the assumed share of pairs that are labelled the wrong way round"
    )
    lr: float = Field(1e-3, ge=0, description="peak learning rate")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="the client's optimiser")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.99), description="AdamW's β1, β2")
    eps: float = Field(1e-8, gt=0, description="AdamW's ε")
    momentum: Fraction = Field(0.0, description="SGD's momentum")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, L2 for sgd")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="the learning rate over the whole run, rounds included; linear and cosine end at 0"
    )
    warmup: Fraction = Field(0.0, description="share of the whole run over which the learning rate rises from 0")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a step's gradient; null does not clip")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="whether a client's optimiser starts new in each round or keeps its state"
    )
    optimizer_offload: Literal["cpu", "disk"] | None = Field(
        None,
        description="where the optimiser's state is while a client trains: cpu, for a GPU's adapter; disk, a memory-mapped "
        "file, for full fine-tuning; null: in the adapter's memory",
    )
    nonfinite: Literal["fail", "skip"] = Field(
        "fail", description="for a loss or gradient that is not finite: fail the client, or skip the step and count it"
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto", description="padding-free batches; auto checks the model once and falls back to padding"
    )
    cohort: Literal["off", "auto"] | int = Field(
        "off",
        description="clients that train together in one pass over the base, in the simulator with LoRA: off, a number, "
        "or auto, which times some numbers on the recipe's own batches",
    )

    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32",
        description="of matrix products in training; trained parameters and the loss stay fp32. auto uses bf16 if the "
        "device computes faster in it",
    )
    checkpointing: bool = Field(
        False,
        description="store only each layer's input and compute the rest again in backward: less memory, more time",
    )
    compile: bool = Field(
        False,
        description="train with decoder layers that torch compiles for this machine; it takes a minute or more before the "
        "first step, and needs a C++ compiler on a CPU or triton on a GPU",
    )
    loss_chunk: int | None = Field(
        None,
        ge=1,
        description="compute the logits of this many supervised tokens at a time, and again in backward, so that with a "
        "large vocabulary they never all exist; null computes them at once",
    )
    cache_prefix: int | None = Field(
        None,
        ge=1,
        description="MB on disk to store the output of the frozen layers below the first trained one, computed once per "
        "example; for adapter.layers; null computes it each time",
    )

    @field_validator("packing", mode="before")
    @classmethod
    def _parse_on_off(cls, value: Any) -> Any:
        """Accept on and off, which YAML 1.1 reads as booleans."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("cohort", mode="before")
    @classmethod
    def _parse_cohort(cls, value: Any) -> Any:
        """Accept off, which YAML 1.1 reads as a boolean."""
        value = "off" if value is False else value
        if value in {"off", "auto"} or (isinstance(value, int) and not isinstance(value, bool) and value >= 2):
            return value
        raise ValueError(f"train.cohort={value!r} is not valid: set off, auto, or a number of clients from 2 on")

    @property
    def cohort_size(self) -> int:
        """The number of clients that train together, of a resolved recipe; 1 if each trains alone."""
        return self.cohort if isinstance(self.cohort, int) else 1

    @model_validator(mode="before")
    @classmethod
    def _fill_steps(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "steps": 8}
        return values

    @model_validator(mode="after")
    def _check_offload(self) -> TrainConfig:
        if self.optimizer_offload and self.optimizer == "sgd" and not self.momentum:
            raise ValueError(
                f"train.optimizer_offload={self.optimizer_offload} but sgd without momentum has no state: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_steps_or_epochs(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps={self.steps} and train.epochs={self.epochs} both set how long a client trains: keep one"
            )
        return self
