"""FedRot-LoRA: clients rotate their factors towards the shared ones before sending, so the mean loses less.

Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", arXiv 2602.23638. For any orthogonal
R the factors (B·R, Rᵀ·A) are the same update. So two clients may send the same update in two bases, and the mean of the
two differs from it. Each client solves an orthogonal Procrustes problem against the factors that it received (B°, A°):

    R = argmax tr(Rᵀ M),   M = B_kᵀ·B° / (‖B_k‖‖B°‖) + A_k·A°ᵀ / (‖A_k‖‖A°‖)        R = U·Vᵀ of SVD(M) = U S Vᵀ

and sends (B_k·R, Rᵀ·A_k). Here both factors determine R at once, each normalised; B° = 0 in the first round has no
influence. The paper's partial rotations, and rotations by one factor at a time, are not implemented. The server averages
as `fedit` does, so the rule is a sum, and inexact. Both factors travel, both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.lora.base import METHODS, LoRAAlgorithm
from fedloom.messages.types import Payload, Update
from fedloom.models.layout import WeightedMean
from fedloom.models.lowrank import one_thread


@one_thread()
def aligned(
    b: torch.Tensor, a: torch.Tensor, b_ref: torch.Tensor, a_ref: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the factors towards (b_ref, a_ref): (b·R, Rᵀ·a). b: [out, r], a: [r, in], in float64."""
    agreement = torch.zeros(a.shape[0], a.shape[0], dtype=a.dtype)
    for cross, size in ((b.T @ b_ref, b.norm() * b_ref.norm()), (a @ a_ref.T, a.norm() * a_ref.norm())):
        if size > 0:
            agreement += cross / size
    u, _, vh = torch.linalg.svd(agreement)
    return b @ (u @ vh), (u @ vh).T @ a


class FedRotLoRA(LoRAAlgorithm):
    properties: ClassVar = base.Properties(linear_sum=True, methods=METHODS)
    about: ClassVar = About("lora", "A and B, both ways", "Zhang et al. 2026, arXiv 2602.23638")

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = WeightedMean(self.shared.layout)
        for update in updates:
            mean.add(update.payload.tensors, self.options.weight(update))
        self.shared.copy_(mean.result())
        return {}

    def receive(self, payload: Payload) -> None:
        super().receive(payload)
        self.reference = {n: t.double().cpu() for n, t in payload.tensors.items()}

    def shared_state(self) -> Payload:
        own = {n: t.detach().double().cpu() for n, t in self.model.adapter.tensors().items()}
        for p in self.pairs:
            own[p.b], own[p.a] = aligned(own[p.b], own[p.a], self.reference[p.b], self.reference[p.a])
        return Payload({n: t.float() for n, t in own.items()})
