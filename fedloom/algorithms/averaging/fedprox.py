"""FedProx: FedAvg with a penalty that keeps clients near the model that they received.

Li et al., "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127, Algorithm 2: client k minimises
h_k(θ; θ_t) = F_k(θ) + μ/2 ‖θ − θ_t‖² over the trainable parameters, where θ_t is this round's broadcast; the server
averages as FedAvg does. Only the whole adapter travels, both ways. The loss that clients report is h_k.

With SGD keep lr · μ below 2, otherwise the steps on the penalty overshoot.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.averaging import fedavg
from fedloom.data.batching import Batch
from fedloom.messages.types import Payload
from fedloom.models.adapters import AdaptedModel
from fedloom.models.layout import block_sum


class FedProx(fedavg.FedAvg):
    properties: ClassVar = base.Properties(linear_sum=True, neutral={"mu": 0.0})
    about: ClassVar = About("averaging", "adapter, both ways", "Li et al. 2018, arXiv 1812.06127")

    class Options(fedavg.FedAvg.Options):
        mu: float = Field(0.01, ge=0, description="μ: how strongly a client stays near the broadcast; 0 is FedAvg")

    options: Options

    def receive(self, payload: Payload) -> None:
        super().receive(payload)
        self._start = self.model.adapter.flat.clone()  # θ_t

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor:
        loss = super().local_loss(model, batch, step_units)
        if not self.options.mu:
            return loss
        # model.parameter is the whole flat buffer, so one term covers every trainable tensor. The shares of a step's
        # batches add up to one penalty.
        share = batch.units / step_units
        penalty: torch.Tensor = self.options.mu / 2 * block_sum((model.parameter - self._start).square())
        return loss + share * penalty
