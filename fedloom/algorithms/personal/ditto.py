"""Ditto: each client also trains its own model, and a proximal term keeps it near the shared model.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", arXiv 2012.04221, Algorithm 1. The
shared model w is FedAvg's, bit for bit. In the same round, on the same batches, client k trains

    v_k ← argmin F_k(v) + λ/2 · ‖v − w_t‖²            (objective (Ditto), w_t as it was received)

Both states use the one live buffer, one after the other; there is no second model. A round costs two trainings. FedAvg's
tensors travel. v_k stays on client k, and is evaluated and saved for it. A client that never trained is evaluated with w.
v_k starts from the first w that the client receives (in the paper: from w_0).
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
        lam: float = Field(
            0.1, ge=0, description="λ: 0 trains the personal model independently, ∞ keeps it at the shared one"
        )

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
        live.copy_(trained)  # `shared_state` sends the live buffer
        return joined({"shared": shared, "own": own}, shared.loss)


class _Near:
    """Adds the gradient λ(v − w_t) of λ/2 · ‖v − w_t‖² to the owner's. The reported loss does not include it."""

    def __init__(self, owner: Ditto, anchor: torch.Tensor, lam: float) -> None:
        self._owner, self._anchor, self._lam = owner, anchor, lam

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor:
        return self._owner.local_loss(model, batch, step_units)

    def before_step(self, model: AdaptedModel) -> None:
        model.grad.add_(model.adapter.flat - self._anchor, alpha=self._lam)

    def after_step(self, model: AdaptedModel) -> None:
        """Nothing."""
