"""Fed-SB: ΔW = s·B·R·A with B and A frozen; only R, r × r, trains and travels. It is exact and sends r² numbers per module.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
LoRA Fine-Tuning", arXiv 2502.15436:

    Σ p_k s·B·R_k·A = s·B·(Σ p_k R_k)·A

The live adapter contains B and R·A. The optimiser trains R: its gradient is (∂L/∂(R·A))·Aᵀ, and R·A is computed again
after each step. A is LoRA's own initial A. B is drawn with variance 1/r, so that a step of Adam changes ΔW about as much
as in LoRA. R starts as 0. Both sides draw A and B from the recipe's seed, so only R travels. The paper takes B, A and R
from an SVD of the first gradient on the clients' data. This file does not, so the paper's ranks and learning rates do
not apply here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.about import NUMBER, About, Sizes
from fedloom.algorithms.lora.base import METHODS, LoRAAlgorithm
from fedloom.common.randomness import torch_generator
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Adapter, Layout, WeightedMean
from fedloom.models.lowrank import A_END, one_thread
from fedloom.training.trainer import FitResult, LocalRun


def middle(a: str) -> str:
    """Return the name of R for an A's name."""
    return a.removesuffix(A_END) + ".lora_R.weight"


def _cores(sizes: Sizes) -> int:
    """Bytes of R in every module."""
    return NUMBER * sizes.modules * sizes.rank**2


class FedSB(LoRAAlgorithm):
    """Attributes: core: R of every module; the server's average, or a client's own."""

    properties: ClassVar = base.Properties(linear_sum=True, exact=True, methods=METHODS, parallel=base.ANY_PARALLEL)
    about: ClassVar = About(
        "lora", "r × r for each layer", "Singhal et al. 2025, arXiv 2502.15436", up=_cores, down=_cores, server=_cores
    )

    def server_model(self, models: Models) -> AdaptedModel:
        model = super().server_model(models)
        self._compose(self.shared)
        return model

    def _known(self, model: AdaptedModel) -> AdaptedModel:
        model = super()._known(model)
        first, device = model.initial_adapter().views, model.device
        self.left, self.right = {}, {}
        for p in self.pairs:
            draw = torch.randn(first[p.b].shape, generator=torch_generator(self.seed, "init", client=p.b))
            self.left[p.b] = (draw / draw.shape[1] ** 0.5).to(device)
            self.right[p.a] = first[p.a].to(device)
        rank = self.adapter.rank
        self.core = Adapter(Layout({middle(p.a): (rank, rank) for p in self.pairs}), device)
        return model

    @one_thread()
    def _compose(self, adapter: Adapter) -> None:
        """Write B and R·A into an adapter."""
        for p in self.pairs:
            adapter.views[p.b].copy_(self.left[p.b])
            adapter.views[p.a].copy_(self.core.views[middle(p.a)] @ self.right[p.a])

    def round_payload(self, client: str) -> Payload:
        return Payload(self.core.tensors())

    def layout_for(self, client: str) -> Layout:
        return self.core.layout

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = WeightedMean(self.core.layout)
        for update in updates:
            mean.add(update.payload.tensors, self.options.weight(update))
        self.core.copy_(mean.result())
        self._compose(self.shared)
        return {}

    def server_state(self) -> Payload:
        return Payload(self.core.tensors())

    def load_server_state(self, state: Payload) -> None:
        self.core.load(state.tensors)
        self._compose(self.shared)

    def receive(self, payload: Payload) -> None:
        self.core.load(payload.tensors)
        self._compose(self.model.adapter)

    def local_training(self, run: LocalRun) -> FitResult:
        parameter = torch.nn.Parameter(self.core.flat)  # shares the memory of `core`
        parameter.grad = torch.zeros_like(self.core.flat)
        self.gradient = self.core.layout.views(parameter.grad)
        return run.fit(self, parameter)

    @one_thread()
    def before_step(self, model: AdaptedModel) -> None:
        gradients = model.adapter.layout.views(model.grad)
        for p in self.pairs:
            self.gradient[middle(p.a)].copy_(gradients[p.a] @ self.right[p.a].T)

    def after_step(self, model: AdaptedModel) -> None:
        self._compose(model.adapter)

    def shared_state(self) -> Payload:
        return Payload(self.core.tensors())
