"""FlexLoRA: average the products, not the factors, and give each client the leading directions that its rank has room for.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
arXiv 2402.11505:

    ΔW = Σ p_k s·B_k·A_k = U Σ Vᵀ          at any ranks
    client k gets  s·B = U_r √Σ_r,  A = √Σ_r V_rᵀ  with r = r_k

The singular values come from QR of the stacked factors, never from the dense out × in matrix (the paper forms that), and
are shared evenly between B and A, so both train at one pace. What is lost is the tail of the singular values beyond
r_max (Eckart–Young), which is logged. A direction with no singular value gets B = 0 and A as first initialised: the
product is the same and it can still learn. Both factors travel, both ways, each client's at its own rank; what a client
of a lower rank is measured with is what it can hold.
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

#: A singular value below this share of the largest is rounding.
NOTHING = 1e-7


def split(total: LowRank, unused: torch.Tensor) -> LowRank:
    """The leading directions of `total`, as many as `unused` ([r, in]) has rows, which stand in where there are fewer."""
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
