"""The recipe's `privacy` section: clipping, noise, who adds the noise, and the wanted guarantee.

docs/privacy.md says what the numbers guarantee. This file knows no mechanism; algorithms/privacy/private.py has it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedloom.recipe.sections import Section


class AdaptiveConfig(Section):
    quantile: float = Field(
        0.5, gt=0, lt=1, description="γ: the wanted share of clients whose update is within the clip"
    )
    lr: float = Field(0.2, gt=0, description="η: the clip changes by a factor of at most exp(η) per round")
    noise: float | None = Field(
        None,
        ge=0,
        description="σ_b: standard deviation of the noise on the count of updates within the clip, more than noise/2; "
        "null: a twentieth of the expected clients, and at least twice `noise`",
    )


class PrivacyConfig(Section):
    clip: float = Field(
        1.0,
        gt=0,
        description="C: the largest Euclidean norm of a client's change, over all tensors together; with `adaptive` the "
        "first clip (train.clip is another setting: it bounds the gradient of a step)",
    )
    noise: float | None = Field(
        None,
        ge=0,
        description="z: the noise has standard deviation z·C; null: computed from `epsilon`; 0 only clips and "
        "guarantees nothing",
    )
    epsilon: float | None = Field(
        None, gt=0, description="ε that the whole run may spend; the noise is chosen to stay within it"
    )
    delta: float | None = Field(
        None, gt=0, lt=1, description="δ; null: 1e-5, or n^-1.1 for n clients if that is smaller"
    )
    where: Literal["server", "client"] = Field(
        "server",
        description="who adds the noise: a trusted server to the sum, or every client to its own message",
    )
    adaptive: AdaptiveConfig | None = Field(
        None,
        description="let the clip follow a quantile of the clients' norms: {quantile:, lr:, noise:}; null keeps it fixed",
    )
    seeded: bool = Field(
        False,
        description="draw noise and sampling from the recipe's seed: the run repeats bit for bit, and is private only "
        "against those who do not know the seed; false: from the operating system's entropy",
    )
    population: int | None = Field(
        None, ge=1, description="n: clients that can be sampled; taken from the split and treated as public"
    )

    @model_validator(mode="after")
    def _check_noise_or_epsilon(self) -> PrivacyConfig:
        if self.noise is None and self.epsilon is None:
            raise ValueError(
                "privacy needs a noise or an epsilon: set privacy.noise=1.0 (the noise multiplier) or privacy.epsilon=8"
            )
        if self.noise == 0 and self.epsilon is not None:
            raise ValueError(f"privacy.noise=0 cannot keep privacy.epsilon={self.epsilon:g}: leave one of them out")
        return self
