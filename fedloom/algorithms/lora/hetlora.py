"""HetLoRA: pad different ranks with zeros and average, weighted by the norms of the updates; ranks may shrink.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv 2401.06432:

    aggregate   A ← Σ S_k A_k / Σ S_k, B likewise, zeros beyond r_k;   S_k = ‖ΔW_k‖ over all modules (Frobenius)
    distribute  the leading r_k rows of A and columns of B
    prune       during training a penalty λ‖B[:, γr_k:]‖‖A[γr_k:, :]‖; if that product of norms is smaller after
                training than before, the client continues with rank γ·r_k permanently

Averaging A and B separately is inexact, as in `fedit`, which this rule equals for equal ranks and norms. The paper leaves
two cases open. Rows that no sampled client had keep the server's values, because zeros there could never learn again.
If all norms are zero, clients have the same weight. Both factors travel, both ways, at the client's current rank. A
client of a lower rank is evaluated with the rows and columns that it received.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.lora.base import METHODS, LoRAAlgorithm, Tensors, at_rank, of_rank, padded
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.layout import Layout, check_names
from fedloom.models.lowrank import A_END
from fedloom.recipe.recipe import AdapterConfig

RANK = "rank/"


class HetLoRA(LoRAAlgorithm):
    """Both halves keep the ranks of clients that pruned: the server all of them, a client its own.

    Attributes:
        own: client half: this client's rank.
    """

    properties: ClassVar = base.Properties(mixed_ranks=True, methods=METHODS, neutral={})
    about: ClassVar = About("lora", "A and B, at each rank", "Cho et al. 2024, arXiv 2401.06432")

    class Options(base.AlgorithmOptions):
        weight_by: Literal["norm", "norm_and_examples"] = Field(
            "norm", description="S_k: the norm of a client's update, or that norm times its number of training examples"
        )
        gamma: float | None = Field(
            None,
            gt=0,
            lt=1,
            description="γ: the share of its rank that a client keeps when it prunes; null never prunes",
        )
        penalty: float = Field(
            1e-3, ge=0, description="λ on the part that may be pruned; without gamma it has no effect"
        )

    options: Options  # type: ignore[assignment]

    def __init__(self, options: base.AlgorithmOptions, seed: int, adapter: AdapterConfig) -> None:
        super().__init__(options, seed, adapter)
        self.own = adapter.rank

    # ------------------------------------------------------------------ server

    def rank_of(self, client: str) -> int:
        return min(super().rank_of(client), int(self.kept.tensors.get(RANK + client, self.adapter.rank)))

    def layout_for(self, client: str) -> Layout:
        return at_rank(self.shared.layout, self.rank_of(client))

    def update_layout(self) -> Layout | None:
        return None if self.adapter.ranks or self.options.gamma else self.shared.layout

    def accept(self, update: Update) -> None:
        """Check names and shapes; a client that prunes may send a lower rank, the same one for every module."""
        rank = rank_in(update.payload.tensors)
        if self.options.gamma is None or not 1 <= rank <= self.rank_of(update.client):
            rank = self.rank_of(update.client)
        check_names(at_rank(self.shared.layout, rank), update.payload.tensors)
        base.Algorithm.accept(self, update)

    def weight(self, update: Update) -> float:
        """Return S_k."""
        norm = sum(low.norm() ** 2 for low in self.products(update.payload.tensors).values()) ** 0.5
        return float(norm * (1 if self.options.weight_by == "norm" else update.num_examples))

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        layout = self.shared.layout
        by_norm, unweighted = (torch.zeros(layout.numel, dtype=torch.float64) for _ in range(2))
        size, count, highest, lowest = 0.0, 0, 0, self.adapter.rank
        pruned = {}
        for update in updates:
            weight = self.weight(update)
            for name, tensor in padded(update.payload.tensors, layout).items():
                layout.views(by_norm)[name].add_(tensor.double(), alpha=weight)
                layout.views(unweighted)[name].add_(tensor.double())
            rank = rank_in(update.payload.tensors)
            size, count, highest, lowest = size + weight, count + 1, max(highest, rank), min(lowest, rank)
            if rank < super().rank_of(update.client):
                pruned[RANK + update.client] = torch.tensor(rank)
        self.kept.tensors.update(pruned)
        mean = layout.views(by_norm / size if size else unweighted / count)
        for name, view in of_rank(self.shared.tensors(), highest).items():
            target = self.shared.views[name][tuple(slice(0, n) for n in view.shape)]
            target.copy_(of_rank({name: mean[name]}, highest)[name])
        return {"highest_rank": float(highest), "lowest_rank": float(lowest)}

    # ------------------------------------------------------------------ client

    def receive(self, payload: Payload) -> None:
        self.own = rank_in(payload.tensors)
        if RANK in self.kept.tensors:  # it pruned before, and that update may not have reached the server
            self.own = min(self.own, int(self.kept.tensors[RANK]))
        super().receive(Payload(of_rank(payload.tensors, self.own)))
        self.before = self._tail_size()

    def _tails(self, tensors: Tensors) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(B[:, γr:], A[γr:, :]) of every module, as views."""
        start = self._pruned()
        return ((tensors[p.b][:, start:], tensors[p.a][start:]) for p in self.pairs)

    def _pruned(self) -> int:
        """The rank that this client would have after pruning."""
        return max(1, int(self.own * (self.options.gamma or 1.0)))

    def _tail_size(self) -> float:
        return float(sum(float(b.norm() * a.norm()) for b, a in self._tails(self.model.adapter.views)))

    def before_step(self, model: AdaptedModel) -> None:
        """∂/∂B of λ‖B‖‖A‖ is λ‖A‖·B/‖B‖, and the other way round."""
        if self.options.gamma is None or not self.options.penalty:
            return
        gradients = self._tails(model.adapter.layout.views(model.grad))
        for (b, a), (b_grad, a_grad) in zip(self._tails(model.adapter.views), gradients, strict=True):
            b_size, a_size = float(b.norm()), float(a.norm())
            if b_size and a_size:
                b_grad.add_(b, alpha=self.options.penalty * a_size / b_size)
                a_grad.add_(a, alpha=self.options.penalty * b_size / a_size)

    def shared_state(self) -> Payload:
        if self.options.gamma is not None and self._tail_size() < self.before:
            self.own = self._pruned()
            self.kept = Payload({RANK: torch.tensor(self.own)})
        return Payload(of_rank(self.model.adapter.tensors(), self.own))


def rank_in(tensors: Tensors) -> int:
    """Return the rank of the factors in a payload; 0 if it has none."""
    return next((t.shape[0] for n, t in sorted(tensors.items()) if n.endswith(A_END) and t.dim() == 2), 0)
