"""A recipe's `train` section: how a client trains in a round.

Numbers and names only; what they do is training/'s and the client's to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fedloom.recipe.sections import Fraction, Section


class TrainConfig(Section):
    steps: int | None = Field(
        None, ge=1, description="optimiser steps of a client in a round (8 where neither steps nor epochs is given)"
    )
    epochs: int | None = Field(None, ge=1, description="passes over a client's own data in a round, instead of steps")
    batch_size: int = Field(8, ge=1, description="examples in one forward pass")
    accumulation: int = Field(1, ge=1, description="forward passes summed into one optimiser step")
    objective: Literal["sft", "dpo"] = Field(
        "sft",
        description="sft: learn the answers; dpo: prefer each answer to the rejected one beside it, for data that have both",
    )
    dpo_beta: float = Field(
        0.1, gt=0, description="dpo: β, how much a change against the base counts; large keeps the model near it"
    )
    dpo_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo: the share of pairs taken to be labelled the wrong way round"
    )
    lr: float = Field(1e-3, ge=0, description="peak learning rate")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="the client's optimiser")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.99), description="AdamW's β1, β2")
    eps: float = Field(1e-8, gt=0, description="AdamW's ε")
    momentum: Fraction = Field(0.0, description="SGD's momentum")
    weight_decay: float = Field(0.0, ge=0, description="decoupled under adamw, L2 under sgd")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="the learning rate over the whole run, rounds included; linear and cosine end at 0"
    )
    warmup: Fraction = Field(0.0, description="share of the whole run over which the learning rate rises from 0")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a step's gradient; null does not clip")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="whether a client's optimiser starts afresh in each round or goes on from its last one"
    )
    optimizer_offload: Literal["cpu", "disk"] | None = Field(
        None,
        description="where the optimiser's state is while a client trains: cpu, for a GPU's adapter; disk, a mapped file, "
        "for full fine-tuning; null: beside the adapter",
    )
    nonfinite: Literal["fail", "skip"] = Field(
        "fail", description="a loss or gradient that is not finite: fail the client, or skip the step and count it"
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto", description="padding-free batches; auto tries the model once and falls back to padding"
    )
    cohort: Literal["off", "auto"] | int = Field(
        "off",
        description="clients that train together in one pass over the base, in the simulator with LoRA: off, how many, "
        "or auto, which measures some numbers on the recipe's own batches",
    )

    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32",
        description="of matrix products in training; what trains and the loss stay fp32. auto takes bf16 where the device "
        "is faster in it",
    )
    checkpointing: bool = Field(
        False,
        description="keep each layer's input alone and compute the rest again in backward: less memory, more time",
    )
    compile: bool = Field(
        False,
        description="run each decoder layer as code that torch compiles for this machine, in training; it takes a minute "
        "or more before the first step, and a C++ compiler on a CPU or triton on a GPU",
    )
    loss_chunk: int | None = Field(
        None,
        ge=1,
        description="make the logits of so many supervised tokens at a time and again in backward, so that a large "
        "vocabulary's are never all there; null makes them at once",
    )
    cache_prefix: int | None = Field(
        None,
        ge=1,
        description="MB on disk for what the frozen layers below the first trained one give for each example, which is "
        "computed once then; for adapter.layers; null computes it anew each time",
    )

    @field_validator("packing", mode="before")
    @classmethod
    def _on_and_off(cls, value: Any) -> Any:
        """YAML 1.1 reads on and off as booleans."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("cohort", mode="before")
    @classmethod
    def _off_auto_or_some(cls, value: Any) -> Any:
        """YAML 1.1 reads off as a boolean."""
        value = "off" if value is False else value
        if value in {"off", "auto"} or (isinstance(value, int) and not isinstance(value, bool) and value >= 2):
            return value
        raise ValueError(f"train.cohort={value!r} is not valid: it is off, auto, or a number of clients from 2 on")

    @property
    def cohort_size(self) -> int:
        """Clients that train together, of a resolved recipe; 1 where each trains alone."""
        return self.cohort if isinstance(self.cohort, int) else 1

    @model_validator(mode="before")
    @classmethod
    def _default_steps(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "steps": 8}
        return values

    @model_validator(mode="after")
    def _some_state_to_offload(self) -> TrainConfig:
        if self.optimizer_offload and self.optimizer == "sgd" and not self.momentum:
            raise ValueError(
                f"train.optimizer_offload={self.optimizer_offload} but sgd without momentum keeps no state: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps={self.steps} and train.epochs={self.epochs} both say how long a client trains: keep one"
            )
        return self
