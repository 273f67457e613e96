"""FlexLoRA: average the products, not the factors; each client gets as many leading directions as its rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
arXiv 2402.11505:

    ΔW = Σ p_k s·B_k·A_k = U Σ Vᵀ          at any ranks
    client k gets  s·B = U_r √Σ_r,  A = √Σ_r V_rᵀ  with r = r_k

The singular values come from a QR of the stacked factors, never from the dense out × in matrix as in the paper. B and A
each get the square root of a singular value, so both train at the same speed. The result loses the singular values
beyond r_max (Eckart–Young); their share is logged. A direction without a singular value gets B = 0 and the initial A: the
product is the same, and the direction can still learn. Both factors travel, both ways, at each client's own rank. A
client of a lower rank is evaluated with the directions that it received.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.lora.base import METHODS, LoRAAlgorithm
from fedloom.messages.types import Update
from fedloom.models.lowrank import LowRank

#: A singular value below this share of the largest is treated as rounding error.
NOTHING = 1e-7


def split(total: LowRank, unused: torch.Tensor) -> LowRank:
    """Return the r leading directions of `total`; rows of `unused` ([r, in]) replace missing ones, with B = 0."""
    u, s, vh = total.svd()
    rank = unused.shape[0]
    real = min(rank, int((s > NOTHING * s[0]).sum()))
    root = s[:real].sqrt()
    b = torch.cat([u[:, :real] * root, u.new_zeros(u.shape[0], rank - real)], dim=1)
    return LowRank(b, torch.cat([root[:, None] * vh[:real], unused[real:]]))


class FlexLoRA(LoRAAlgorithm):
    properties: ClassVar = base.Properties(mixed_ranks=True, streams=False, methods=METHODS)
    about: ClassVar = About("lora", "A and B, at each rank", "Bai et al. 2024, arXiv 2402.11505")

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        held = self.held(updates)
        first = self.model.initial_adapter().views
        for pair in self.pairs:
            kept = split(self.total(held, pair), first[pair.a].double())
            self.shared.views[pair.b].copy_(kept.b / self.scales[pair.weight])
            self.shared.views[pair.a].copy_(kept.a)
        return {"truncated": self.gap(held)}
