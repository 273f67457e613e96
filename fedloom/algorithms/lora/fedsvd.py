"""FedSVD: B is trained and averaged under a frozen A, as in FFA-LoRA; after each round A is recomputed from the product.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv 2505.12805:

    B̄ = Σ p_k B_k                    exact, since all clients had the same A
    SVD(B̄·A) = U Σ Vᵀ
    A ← V_rᵀ,  B ← U_r Σ_r           the product is the same, A's rows are orthonormal

The decomposition is computed from the factors (QR and an r × r SVD). B travels up, both factors travel down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.freezing import Frozen
from fedloom.algorithms.lora.base import METHODS
from fedloom.algorithms.lora.ffa_lora import FFALoRA
from fedloom.messages.types import Payload, Update
from fedloom.models.lowrank import LowRank


def orthogonalised(b: torch.Tensor, a: torch.Tensor) -> LowRank:
    """Return (U Σ, Vᵀ) of b·a; b: [out, r], a: [r, in], both float64. Vᵀ is orthonormal also at a lower rank."""
    u, s, vh = LowRank(b, a).svd()
    return LowRank(u * s, vh)


class FedSVD(FFALoRA):
    properties: ClassVar = base.Properties(linear_sum=True, exact=True, methods=METHODS)
    about: ClassVar = About("lora", "B up; both down", "Lee et al. 2025, arXiv 2505.12805", up=lambda s: s.b)

    def round_payload(self, client: str) -> Payload:
        return Payload(self.shared.tensors())

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        metrics = super().aggregate(updates)  # B̄, under the A that the clients had
        views = self.shared.views
        for pair in self.pairs:
            turned = orthogonalised(views[pair.b].double(), views[pair.a].double())
            views[pair.b].copy_(turned.b)
            views[pair.a].copy_(turned.a)
        return metrics

    def receive(self, payload: Payload) -> None:
        self.model.adapter.load(payload.tensors)
        self.frozen = Frozen(self.model, (p.a for p in self.pairs))
