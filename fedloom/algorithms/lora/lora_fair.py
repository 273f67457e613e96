"""LoRA-FAIR: average A and B, then correct B̄ so that the product is close to what clients learned.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", arXiv 2411.14961:

    B ← B̄ + ΔB,   ΔB = argmin ‖Σ p_k B_k·A_k − (B̄ + ΔB)·Ā‖² + λ'‖ΔB‖²
    ΔB = E·Āᵀ·(Ā·Āᵀ + λ'·I)⁻¹,   E = Σ p_k (B_k − B̄)·(A_k − Ā)

The paper uses cosine similarity and gradient descent. The squared distance here has the closed form above, r × r for a
weight of any size. λ' = λ·tr(Ā·Āᵀ)/r, so λ means the same for every module. For large λ the rule becomes `fedit`. Clients
start from the shared factors, as in the paper. Only the two factors travel, both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.averaging import fedavg
from fedloom.algorithms.lora.base import METHODS, LoRAAlgorithm
from fedloom.algorithms.lora.fedex_lora import averaged
from fedloom.messages.types import Update
from fedloom.models.lowrank import LowRank, one_thread


@one_thread()
def refined(shares: Sequence[float], b: Sequence[torch.Tensor], a: Sequence[torch.Tensor], strength: float) -> LowRank:
    """Return (B̄ + ΔB)·Ā for factors [out, r] and [r, in] in float64."""
    mean, residual = averaged(shares, b, a)
    gram = mean.a @ mean.a.T
    damped = gram + strength * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    wanted = residual.b @ (residual.a @ mean.a.T)  # E·Āᵀ, through the factors
    return LowRank(mean.b + torch.linalg.solve(damped, wanted.T).T, mean.a)


class LoRAFAIR(LoRAAlgorithm):
    properties: ClassVar = base.Properties(streams=False, methods=METHODS, neutral={})
    about: ClassVar = About("lora", "A and B, both ways", "Bian et al. 2024, arXiv 2411.14961")

    class Options(fedavg.FedAvg.Options):
        strength: float = Field(
            0.01,
            gt=0,
            description="λ, relative to the mean square of A: how strongly B stays at its mean; large gives fedit",
        )

    options: Options

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        held = self.held(updates)
        for pair in self.pairs:
            b, a = ([t[n].double() for t in held.tensors] for n in (pair.b, pair.a))
            result = refined(held.shares, b, a, self.options.strength)  # s cancels
            self.shared.views[pair.b].copy_(result.b)
            self.shared.views[pair.a].copy_(result.a)
        return {"gap": self.gap(held)}
