"""FFA-LoRA: A stays at its initial value, only B trains and travels. Averaging is exact and traffic halves.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313:

    Σ p_k s·B_k·A₀ = s·(Σ p_k B_k)·A₀

A₀ follows from the recipe's seed on both sides (peft draws it on the CPU), so it never travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.freezing import Frozen
from fedloom.algorithms.lora.base import METHODS, LoRAAlgorithm, fill, part_of
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.layout import Layout, WeightedMean


class FFALoRA(LoRAAlgorithm):
    properties: ClassVar = base.Properties(linear_sum=True, exact=True, methods=METHODS)
    about: ClassVar = About(
        "lora", "B, both ways", "Sun et al. 2024, arXiv 2403.12313", up=lambda s: s.b, down=lambda s: s.b
    )

    def _known(self, model: AdaptedModel) -> AdaptedModel:
        model = super()._known(model)
        self.part = part_of(model.adapter.layout, (p.b for p in self.pairs))
        return model

    def round_payload(self, client: str) -> Payload:
        return Payload({n: self.shared.views[n] for n in self.part.names})

    def layout_for(self, client: str) -> Layout:
        return self.part

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = WeightedMean(self.part)
        for update in updates:
            mean.add(update.payload.tensors, self.options.weight(update))
        fill(self.shared, self.part, self.part.views(mean.result()))
        return {}

    def receive(self, payload: Payload) -> None:
        self.model.adapter.copy_(self.model.initial)
        fill(self.model.adapter, self.part, payload.tensors)
        self.frozen = Frozen(self.model, (p.a for p in self.pairs))

    def before_step(self, model: AdaptedModel) -> None:
        self.frozen.before_step()

    def after_step(self, model: AdaptedModel) -> None:
        self.frozen.after_step()

    def shared_state(self) -> Payload:
        return Payload({n: self.model.adapter.views[n] for n in self.part.names})
