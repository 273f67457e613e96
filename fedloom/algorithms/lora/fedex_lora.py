"""FedEx-LoRA: average A and B, and add the residual to the base weights. This is exact.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models",
arXiv 2410.09432:

    Ā = Σ p_k A_k,  B̄ = Σ p_k B_k
    W ← W + s·(Σ p_k B_k·A_k − B̄·Ā) = W + s·Σ p_k (B_k − B̄)·(A_k − Ā)

The second form has no cancellation, and rank (K − 1)·r for K clients. It must include s: without α/r the residual has the
wrong size. Both factors travel up; both factors and the base delta of all rounds travel down (base_delta.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.about import About, Sizes
from fedloom.algorithms.lora.base import METHODS
from fedloom.algorithms.lora.base_delta import DeltaAlgorithm
from fedloom.messages.types import Update
from fedloom.models.lowrank import LowRank


def averaged(shares: Sequence[float], b: Sequence[torch.Tensor], a: Sequence[torch.Tensor]) -> tuple[LowRank, LowRank]:
    """Return (B̄·Ā, Σ p_k B_k·A_k − B̄·Ā) in the dtype of the factors; their sum is exact."""
    b_mean = sum((p * x for p, x in zip(shares, b, strict=True)), torch.zeros_like(b[0]))
    a_mean = sum((p * x for p, x in zip(shares, a, strict=True)), torch.zeros_like(a[0]))
    residual = LowRank.stack((p, x - b_mean, y - a_mean) for p, x, y in zip(shares, b, a, strict=True))
    return LowRank(b_mean, a_mean), residual


def _residual(sizes: Sizes, rounds: int) -> int:
    """Bytes of the base delta after `rounds` rounds, each of which adds rank (K − 1)·r."""
    return sizes.delta(rounds * (sizes.clients - 1) * sizes.rank)


class FedExLoRA(DeltaAlgorithm):
    properties: ClassVar = base.Properties(
        exact=True, streams=False, methods=METHODS, neutral={}, parallel=frozenset({"ddp"}), weights=True
    )
    about: ClassVar = About(
        "lora",
        "A and B; W's residual",
        "Singhal et al. 2024, arXiv 2410.09432",
        down=lambda s: s.adapter + _residual(s, s.round - 1),
        server=lambda s: s.adapter + _residual(s, s.round),
    )

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        held = self.held(updates)
        for pair in self.pairs:
            scale = self.scales[pair.weight]
            b = [scale * t[pair.b].double() for t in held.tensors]  # s·B_k
            mean, residual = averaged(held.shares, b, [t[pair.a].double() for t in held.tensors])
            self.shared.views[pair.b].copy_(mean.b / scale)
            self.shared.views[pair.a].copy_(mean.a)
            self.delta.add(pair.weight, residual.compact())
        return {"residual": self.gap(held)}
