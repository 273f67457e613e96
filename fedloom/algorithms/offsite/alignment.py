"""Align an emulator on the server's public data. The settings are separate: `data` and `train` have no effect here.

Each alignment uses the next part of the public examples, in an order of its own. This file does not know when an
algorithm aligns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.common import cache_folder
from fedloom.common.errors import UserError
from fedloom.data.batching import Batch, Plan, collate, round_indices
from fedloom.data.loading import load_corpus
from fedloom.data.prompts import Template
from fedloom.data.tokenization import tokenise
from fedloom.models.adapters import AdaptedModel
from fedloom.models.emulator.compression import Compression
from fedloom.models.emulator.cut import Cut
from fedloom.models.emulator.distillation import Distillation, align
from fedloom.models.forward import supports_packing
from fedloom.recipe.recipe import DataConfig

log = logging.getLogger(__name__)

#: Names the random order of the examples. No client can have this name, because it cannot be a folder's name.
STREAM = "/alignment"


class AlignOptions(base.AlgorithmOptions):
    corpus: str | None = Field(None, description="public corpus by name")
    path: str | None = Field(None, description="or your own file, as data.path")
    columns: dict[Literal["instruction", "input", "output", "category"], str] | None = Field(
        None, description="as data.columns"
    )
    template: Literal["auto", "chat", "alpaca", "plain"] = Field("auto", description="as data.template")
    max_length: int = Field(256, ge=8, description="most tokens in a sequence")
    limit: int | None = Field(None, ge=1, description="at most this many examples")
    seed: int | None = Field(
        None,
        ge=0,
        description="seed of a generated corpus and of limit; null: the recipe's seed + 1, so not the clients' data",
    )
    steps: int = Field(50, ge=1, description="optimiser steps of one alignment")
    batch_size: int = Field(4, ge=1, description="examples in a step")
    lr: float = Field(1e-4, gt=0, description="AdamW's rate, constant")
    kl: float = Field(0.0, ge=0, description="λ of the next token's KL term")
    layerwise: bool = Field(
        False, description="match the hidden states of every kept layer, not only of the middle's last"
    )

    def data(self) -> DataConfig:
        """Return these settings as a recipe's `data` section. Raises UserError if no data are named."""
        if self.corpus is None and self.path is None:
            raise UserError("algorithm.align names no data: set algorithm.align.corpus or algorithm.align.path")
        return DataConfig(
            corpus=self.corpus,
            path=self.path,
            columns=self.columns,
            max_length=self.max_length,
            limit=self.limit,
            template=self.template,
        )


class Aligner:
    """Trains emulators on public data. Raises UserError if the data cannot be loaded."""

    def __init__(self, options: AlignOptions, model: AdaptedModel, seed: int) -> None:
        data = options.data()
        corpus = load_corpus(data, seed=seed + 1 if options.seed is None else options.seed)
        template = Template.choose(model.tokenizer, options.template)
        self.options, self.seed = options, seed
        self.sequences = tokenise(corpus, template, options.max_length, cache_folder.cache_home() / "tokenised")
        self.pad = model.tokenizer.pad_token_id or 0
        self.settings = Distillation(options.lr, options.kl, options.layerwise)

    def batches(self, number: int, packed: bool) -> Iterator[Batch]:
        """Yield the batches of alignment `number` (from 1)."""
        plan = Plan(self.options.batch_size, steps=self.options.steps)
        for (indices,) in round_indices(range(len(self.sequences)), plan, number, self.seed, STREAM):
            yield collate([self.sequences[i] for i in indices], packed=packed, pad=self.pad, examples=indices)

    def align(
        self, model: AdaptedModel, cut: Cut, compression: Compression, latents: dict[str, torch.Tensor], number: int
    ) -> tuple[float, float]:
        """Train `latents` in place; return the loss of the first and of the last step."""
        losses = align(
            model, cut, compression, latents, self.batches(number, supports_packing(model)), self.settings
        )  # fmt: skip
        log.info(f"emulator aligned in {len(losses)} steps: loss {losses[0]:.4f} → {losses[-1]:.4f}")
        return losses[0], losses[-1]
