"""RoLoRA: odd rounds train and average B with a shared A, even rounds A with a shared B. Every round is exact.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", arXiv 2502.01755:

    odd    Σ p_k s·B_k·A = s·(Σ p_k B_k)·A
    even   Σ p_k s·B·A_k = s·B·(Σ p_k A_k)

B is trained first, because it starts as zero, and with B = 0 A has no gradient. The trained factor travels up. Both travel
down, because a client may have missed the round before.
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


class RoLoRA(LoRAAlgorithm):
    """The server keeps `finished`, the number of aggregated rounds."""

    properties: ClassVar = base.Properties(linear_sum=True, exact=True, methods=METHODS)
    about: ClassVar = About(
        "lora", "A or B; both down", "Chen et al. 2025, arXiv 2502.01755", up=lambda s: s.b if s.round % 2 else s.a
    )

    @property
    def finished(self) -> int:
        return int(self.kept.meta.get("finished", 0))

    def trained(self, round: int) -> Layout:
        """Return the layout of the factor that `round` trains."""
        return part_of(self.model.adapter.layout, (p.b if round % 2 else p.a for p in self.pairs))

    def layout_for(self, client: str) -> Layout:
        return self.trained(self.finished + 1)

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        part = self.trained(self.finished + 1)
        mean = WeightedMean(part)
        for update in updates:
            mean.add(update.payload.tensors, self.options.weight(update))
        fill(self.shared, part, part.views(mean.result()))
        self.kept.meta["finished"] = self.finished + 1
        return {}

    def receive(self, payload: Payload) -> None:
        super().receive(payload)
        trained = self.trained(self.round).shapes
        self.frozen = Frozen(self.model, (n for n in self.model.adapter.layout.names if n not in trained))

    def before_step(self, model: AdaptedModel) -> None:
        self.frozen.before_step()

    def after_step(self, model: AdaptedModel) -> None:
        self.frozen.after_step()

    def shared_state(self) -> Payload:
        return Payload({n: self.model.adapter.views[n] for n in self.trained(self.round).names})
