"""pFedMe: the shared model minimises the clients' Moreau envelopes; each client keeps the minimiser of its own.

Dinh et al., "Personalized Federated Learning with Moreau Envelopes", arXiv 2006.08848. Client k minimises

    F_k(w) = min_θ f_k(θ) + λ/2 · ‖θ − w‖²              the Moreau envelope of f_k, its minimiser θ̂_k(w)
    ∇F_k(w) = λ (w − θ̂_k(w))                           the gradient of the local steps (Algorithm 1)

θ̂ comes from K gradient steps on the inner problem, over the step's own batch, starting at θ = w with rate 1/λ. That is
the natural rate if λ is larger than the curvature: θ ← θ − (∇f(θ) + λ(θ − w))/λ = w − ∇f(θ)/λ. So ∇F_k(w) is the gradient
of f at the last inner point but one, and the recipe's optimiser uses it. With λ → ∞, or K = 1, w is FedAvg's.

The server mixes: w ← (1 − β) w + β Σ_k p_k w_k. The adapter travels both ways as in FedAvg. θ_k, from the client's last
step, stays on the client, and is evaluated and saved. A step costs K forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About, whole
from fedloom.algorithms.averaging import fedavg
from fedloom.algorithms.personal.turns import copies
from fedloom.data.batching import Batch
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.training.flops import flops_of
from fedloom.training.precision import LossScale
from fedloom.training.trainer import FitResult, LocalRun, backward, passes


class PFedMe(fedavg.FedAvg):
    properties: ClassVar = base.Properties(linear_sum=True, personal=True, parallel=base.ANY_PARALLEL)
    about: ClassVar = About("personalised", "adapter, both ways", "Dinh et al. 2020, arXiv 2006.08848", client=whole)

    class Options(fedavg.FedAvg.Options):
        lam: float = Field(200.0, gt=0, description="λ: how strongly the personal model stays near the shared one")
        inner_steps: int = Field(2, ge=1, description="K: gradient steps towards the personal model in each local step")
        beta: float = Field(1.0, gt=0, description="β: how far the server goes towards the clients' mean")

    options: Options

    def receive(self, payload: Payload) -> None:
        super().receive(payload)
        if self.evaluating and self.kept.tensors:
            self.model.adapter.load(self.kept.tensors)

    def local_training(self, run: LocalRun) -> FitResult:
        self._seen: dict[int, tuple[Batch, int]] = {}  # a step that is repeated at another loss scale has a batch twice
        self._extra = FitResult()
        self._flops = flops_of(run.model)
        self._ranks, self._train = run.ranks, run.config
        self._scale = LossScale(run.config.precision, run.model.base.dtype)  # of the inner passes
        result = run.fit(self)
        if result.steps:
            live = run.model.adapter
            self.kept = Payload(copies(live.layout.views(self._theta)))
        tokens, flops = run.ranks.counts(self._extra.tokens, self._extra.flops)
        result.tokens, result.flops = result.tokens + tokens, result.flops + flops
        return result

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor:
        self._seen[id(batch)] = batch, step_units
        return super().local_loss(model, batch, step_units)

    def before_step(self, model: AdaptedModel) -> None:
        """Replace ∇f(w) in `model.grad` by λ(w − θ_K) = ∇f(θ_{K−1})."""
        live = model.adapter.flat
        w = live.clone()
        for _ in range(self.options.inner_steps - 1):
            live.copy_(w - model.grad / self.options.lam)
            with passes(model, self._train):
                while self._scale.overflowed(model.grad, self._inner_pass(model)):
                    pass
        self._seen.clear()
        self._candidate = w - model.grad / self.options.lam
        live.copy_(w)

    def _inner_pass(self, model: AdaptedModel) -> float:
        """Compute ∇f at the live point, times the loss scale, into `model.grad`, as the trainer does; return f."""
        model.grad.zero_()
        total = 0.0
        for batch, step_units in self._seen.values():
            loss = super().local_loss(model, batch, step_units)
            backward(model, loss, self._scale)
            total += float(loss.detach())
            self._extra.tokens += batch.tokens
            self._extra.flops += self._flops.of(batch)
        self._ranks.sum_(model.grad)
        penalty = model.penalty()
        if penalty is not None:
            backward(model, penalty, self._scale)
        return self._ranks.total(total)

    def after_step(self, model: AdaptedModel) -> None:
        self._theta = self._candidate  # not called for a skipped step

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        before = self.shared.flat.clone()
        metrics = super().aggregate(updates)
        if self.options.beta != 1.0:
            self.shared.copy_(torch.lerp(before, self.shared.flat, self.options.beta))
        return metrics
