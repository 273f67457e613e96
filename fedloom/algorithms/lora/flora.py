"""FLoRA: stack the clients' factors (exact at any ranks), merge them into the base weights, start a new adapter.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
arXiv 2409.05976:

    B = [B_1 | B_2 | …],  A = [p_1·A_1; p_2·A_2; …]:   s·B·A = Σ p_k s·B_k·A_k
    W ← W + s·B·A,  and every client begins the next round with a new A and B = 0

The merge must include s: without α/r the base weights change by the wrong amount. A client draws its new A from the
recipe's seed, its name and the round. So only the base delta of all rounds travels down (base_delta.py). Both factors
travel up, at the client's own rank. The adapter that is saved at the end has B = 0: the result is the delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.lora.base import METHODS, of_rank
from fedloom.algorithms.lora.base_delta import DeltaAlgorithm
from fedloom.common.randomness import torch_generator
from fedloom.messages.types import Payload, Update


class FLoRA(DeltaAlgorithm):
    properties: ClassVar = base.Properties(
        exact=True, mixed_ranks=True, streams=False, methods=METHODS, parallel=frozenset({"ddp"}), weights=True
    )
    about: ClassVar = About(
        "lora",
        "A and B; the change of W",
        "Wang et al. 2024, arXiv 2409.05976",
        down=lambda s: s.delta(s.rank * s.clients * (s.round - 1)),
        server=lambda s: s.adapter + s.delta(s.rank * s.clients * s.round),
    )

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        held = self.held(updates)
        for pair in self.pairs:
            self.delta.add(pair.weight, self.total(held, pair))
        ranks = [part.shape[1] for name, part in self.delta.tensors().items() if name.endswith(".B")]
        return {"delta_rank": float(max(ranks, default=0))}

    def round_payload(self, client: str) -> Payload:
        return Payload(self.delta.prefixed())

    def receive(self, payload: Payload) -> None:
        super().receive(Payload({**of_rank(self.fresh(), self.rank_of(self.client)), **payload.tensors}))

    def fresh(self) -> dict[str, torch.Tensor]:
        """Draw a new adapter at full rank: B = 0, A as LoRA draws it, uniform in ±1/√in."""
        generator = torch_generator(self.seed, "init", self.round, self.client)
        new = {}
        for pair in self.pairs:
            shapes = self.model.adapter.layout.shapes
            new[pair.b] = torch.zeros(shapes[pair.b])
            bound = 1 / sqrt(shapes[pair.a][1])
            new[pair.a] = (2 * torch.rand(shapes[pair.a], generator=generator) - 1) * bound
        return new
