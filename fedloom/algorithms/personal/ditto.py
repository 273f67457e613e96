"""Ditto: beside the shared model each client trains one of its own, held near the shared one by a proximal term.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", arXiv 2012.04221, Algorithm 1. The
shared model w takes FedAvg's path, bit for bit. In the same round, on the same batches, client k trains

    v_k ← argmin F_k(v) + λ/2 · ‖v − w_t‖²            (objective (Ditto), w_t as it was received)

Two flat states take turns in one live buffer over one base; there is no second model. A round costs two trainings.
What travels is what FedAvg sends; v_k stays, and is what is evaluated and saved for client k. A client that never
trained is measured with w; v_k starts from the w that it first receives (the paper: from w_0).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About, whole
from fedloom.algorithms.averaging import fedavg
from fedloom.algorithms.personal.turns import copies, joined, turn
from fedloom.data.batching import Batch
from fedloom.messages.types import Payload
from fedloom.models.adapters import AdaptedModel
from fedloom.training.trainer import FitResult, LocalRun


class Ditto(fedavg.FedAvg):
    properties: ClassVar = base.Properties(linear_sum=True, personal=True, parallel=base.ANY_PARALLEL)
    about: ClassVar = About("personalised", "adapter, both ways", "Li et al. 2020, arXiv 2012.04221", client=whole)

    class Options(fedavg.FedAvg.Options):
        lam: float = Field(0.1, ge=0, description="λ: 0 trains the personal model alone, ∞ leaves it the shared one")

    options: Options

    def receive(self, payload: Payload) -> None:
        super().receive(payload)
        if self.evaluating and self.kept.tensors:
            self.model.adapter.load(self.kept.tensors)

    def local_training(self, run: LocalRun) -> FitResult:
        live = run.model.adapter
        received = live.flat.clone()
        shared = turn(run, "shared").fit(self)
        if not shared.steps:
            return joined({"shared": shared}, shared.loss)  # nothing was learned: the client fails
        trained = live.flat.clone()
        if self.kept.tensors:
            live.load(self.kept.tensors)
        else:
            live.copy_(received)
        own = turn(run, "own").fit(_Near(self, received, self.options.lam))
        self.kept = Payload(copies(live.tensors()))
        live.copy_(trained)  # `shared_state` sends what stands in the live buffer
        return joined({"shared": shared, "own": own}, shared.loss)


class _Near:
    """The owner's loss, and λ/2 · ‖v − w_t‖² through its gradient λ(v − w_t); the loss is reported without it."""

    def __init__(self, owner: Ditto, anchor: torch.Tensor, lam: float) -> None:
        self._owner, self._anchor, self._lam = owner, anchor, lam

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor:
        return self._owner.local_loss(model, batch, step_units)

    def before_step(self, model: AdaptedModel) -> None:
        model.grad.add_(model.adapter.flat - self._anchor, alpha=self._lam)

    def after_step(self, model: AdaptedModel) -> None:
        """Nothing."""
