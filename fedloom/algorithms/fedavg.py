"""FedAvg: the mean of what clients send, weighted by how much data they trained on.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629,
Algorithm 1: θ ← Σ_k (n_k / n) θ_k. The whole adapter travels, both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from fedloom.algorithms import base
from fedloom.models.state import WeightedMean
from fedloom.types import Update


class FedAvg(base.Algorithm):
    properties: ClassVar = base.Properties(linear_sum=True, neutral={})

    class Options(base.AlgorithmOptions):
        weight_by: Literal["examples", "tokens"] = Field(
            "examples", description="n_k: a client's training examples, or the supervised tokens in them"
        )

    options: Options

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = WeightedMean(self.shared.layout)
        for update in updates:
            weight = update.num_examples if self.options.weight_by == "examples" else update.num_tokens
            mean.add(update.payload.tensors, weight)
        before = self.shared.flat.clone()
        self.shared.copy_(mean.result())
        return {"distance_moved": float((self.shared.flat - before).norm())}
