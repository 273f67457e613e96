"""FedAvg: the mean of what clients send, weighted by the amount of data they trained on.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629,
Algorithm 1: θ ← Σ_k (n_k / n) θ_k. The whole adapter travels, both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.messages.types import Update
from fedloom.models.layout import WeightedMean


class FedAvg(base.Algorithm):
    properties: ClassVar = base.Properties(linear_sum=True, neutral={})
    about: ClassVar = About("averaging", "adapter, both ways", "McMahan et al. 2016, arXiv 1602.05629")

    class Options(base.AlgorithmOptions):
        weight_by: Literal["examples", "tokens"] = Field(
            "examples", description="n_k: a client's training examples, or the supervised tokens in them"
        )

        def weight(self, update: Update) -> int:
            """Return n_k of this update."""
            return update.num_examples if self.weight_by == "examples" else update.num_tokens

    options: Options

    def mean_of(self, updates: Iterable[Update]) -> torch.Tensor:
        """Return Σ_k (n_k / n) θ_k over updates of the whole adapter, read one at a time: [numel] float32."""
        mean = WeightedMean(self.shared.layout)
        for update in updates:
            mean.add(update.payload.tensors, self.options.weight(update))
            del update  # so that no two of them are in memory while the next one is decoded
        return mean.result()

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = self.mean_of(updates)
        moved = float((mean - self.shared.flat).norm())
        self.shared.copy_(mean)
        return {"distance_moved": moved}
