"""FedIT: average LoRA's A and B separately. The baseline of this family, and inexact.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644:

    Ā = Σ p_k A_k,  B̄ = Σ p_k B_k,  but  s·B̄·Ā ≠ Σ p_k s·B_k·A_k

Each round logs the relative distance between the two sides (`gap`), to compare with the other algorithms of the family. To
compute it, the server keeps all updates of a round in memory. `fedavg` is the same rule as a stream. Both factors travel,
both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.lora.base import METHODS, LoRAAlgorithm
from fedloom.messages.types import Update


class FedIT(LoRAAlgorithm):
    properties: ClassVar = base.Properties(streams=False, methods=METHODS, neutral={})
    about: ClassVar = About("lora", "A and B, both ways", "Zhang et al. 2023, arXiv 2305.05644")

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        held = self.held(updates)
        self.shared.load(held.mean(self.shared.layout))
        return {"gap": self.gap(held)}
