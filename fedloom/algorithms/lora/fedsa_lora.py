"""FedSA-LoRA: A is shared and averaged; every client keeps its own B.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv 2410.01463:

    A ← Σ p_k A_k;  client k's model is W + s·B_k·A

A is what clients learn in common, B is personal. A travels, both ways. B never leaves its client and is kept there
between rounds. B starts as zero, so a client that was never sampled is evaluated with the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.lora.base import METHODS, LoRAAlgorithm, fill, part_of
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.layout import Layout, WeightedMean


class FedSALoRA(LoRAAlgorithm):
    properties: ClassVar = base.Properties(linear_sum=True, personal=True, methods=METHODS, neutral={})
    about: ClassVar = About(
        "lora",
        "A, both ways",
        "Guo et al. 2024, arXiv 2410.01463",
        up=lambda s: s.a,
        down=lambda s: s.a,
        client=lambda s: s.b,
    )

    def _known(self, model: AdaptedModel) -> AdaptedModel:
        model = super()._known(model)
        self.part = part_of(model.adapter.layout, (p.a for p in self.pairs))
        self.own = part_of(model.adapter.layout, (p.b for p in self.pairs))
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
        if self.kept.tensors:
            fill(self.model.adapter, self.own, self.kept.tensors)

    def shared_state(self) -> Payload:
        views = self.model.adapter.views
        self.kept = Payload({n: views[n].detach().cpu().clone() for n in self.own.names})
        return Payload({n: views[n] for n in self.part.names})
