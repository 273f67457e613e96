"""What algorithms on LoRA's two factors have in common: names, scales, ranks, and rounds kept in memory.

ΔW = s·B·A with A [r, in], B [out, r] and one scale s for all clients, whatever their rank (`adapter.alpha` over
`adapter.rank`). A client of rank r_k receives the leading r_k rows of A and columns of B, and sends as many back. In
the live buffer, which has rank r_max, the rest is zero. A zero row of A with a zero column of B has no gradient, so it
stays zero. An algorithm without mixed ranks sees whole tensors everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.averaging import fedavg
from fedloom.common.errors import UserError
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Adapter, Layout, WeightedMean, check_names
from fedloom.models.lowrank import A_END, B_END, LoraPair, LowRank, find_lora_pairs, relative_gap

METHODS = frozenset({"lora"})


Tensors = Mapping[str, torch.Tensor]


class LoRAAlgorithm(base.Algorithm):
    """The contract of this family: each client gets and sends both factors at its own rank.

    Attributes:
        pairs: the LoRA modules, in order.
        scales: base weight → s.
    """

    properties: ClassVar = base.Properties(methods=METHODS)

    class Options(fedavg.FedAvg.Options):
        pass

    options: fedavg.FedAvg.Options

    def server_model(self, models: Models) -> AdaptedModel:
        return self._known(super().server_model(models))

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        return self._known(super().client_model(models, payload))

    def _known(self, model: AdaptedModel) -> AdaptedModel:
        names = model.adapter.layout.names
        self.pairs = find_lora_pairs(names)
        self.scales = model.lora_scales()
        plain = {n for p in self.pairs for n in (p.a, p.b)}
        foreign = [n for n in names if n not in plain]
        if foreign:
            raise UserError(
                f"this algorithm works on LoRA's two factors, but the adapter also trains {foreign[0]}: "
                "use plain LoRA on linear layers, or an algorithm that averages any adapter, such as fedavg"
            )
        return model

    # ------------------------------------------------------------------ ranks

    def rank_of(self, client: str) -> int:
        return self.adapter.rank_of(client)

    def round_payload(self, client: str) -> Payload:
        return Payload(of_rank(self.shared.tensors(), self.rank_of(client)))

    def receive(self, payload: Payload) -> None:
        self.model.adapter.load(padded(payload.tensors, self.model.adapter.layout))

    def shared_state(self) -> Payload:
        return Payload(of_rank(self.model.adapter.tensors(), self.rank_of(self.client)))

    def layout_for(self, client: str) -> Layout:
        """Return names and shapes that an update of `client` must have."""
        return at_rank(self.shared.layout, self.rank_of(client))

    def update_layout(self) -> Layout | None:
        return None if self.adapter.ranks else self.layout_for("")

    def accept(self, update: Update) -> None:
        check_names(self.layout_for(update.client), update.payload.tensors)
        super().accept(update)

    # ------------------------------------------------------------------ arithmetic

    def product(self, tensors: Tensors, pair: LoraPair) -> LowRank:
        """Return s·B·A of one module, in float64."""
        return LowRank(self.scales[pair.weight] * tensors[pair.b].double().cpu(), tensors[pair.a].double().cpu())

    def products(self, tensors: Tensors) -> dict[str, LowRank]:
        """Base weight → s·B·A."""
        return {p.weight: self.product(tensors, p) for p in self.pairs}

    def held(self, updates: Iterable[Update]) -> Held:
        """Collect all updates of a round in memory, for rules that are not a sum of what is sent."""
        listed = sorted(updates, key=lambda u: u.client)  # so that the order of listing cannot matter
        weights = [self.options.weight(u) for u in listed]
        return Held([w / sum(weights) for w in weights], [u.payload.tensors for u in listed], weights)

    def exact(self, held: Held) -> dict[str, LowRank]:
        """Base weight → Σ p_k ΔW_k, the result of an exact rule."""
        return {p.weight: self.total(held, p) for p in self.pairs}

    def total(self, held: Held, pair: LoraPair) -> LowRank:
        """Return Σ p_k s·B_k·A_k of one module, as stacked factors."""
        products = [self.product(t, pair) for t in held.tensors]
        return LowRank.stack((p, low.b, low.a) for p, low in zip(held.shares, products, strict=True))

    def gap(self, held: Held) -> float:
        """‖Σ p_k ΔW_k − s·B·A‖ / ‖Σ p_k ΔW_k‖ for the shared B, A: how inexact this round is."""
        return relative_gap(self.products(self.shared.tensors()), self.exact(held))


@dataclass
class Held:
    """One round's updates, in the order of the clients' names.

    Attributes:
        shares: p_k, with sum 1.
        tensors: what each client sent.
        weights: the whole numbers that the shares are computed from.
    """

    shares: Sequence[float]
    tensors: Sequence[Tensors]
    weights: Sequence[int]

    def mean(self, layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Return Σ p_k x_k of every tensor of `layout`; each update must have all of them."""
        mean = WeightedMean(layout)
        for tensors, weight in zip(self.tensors, self.weights, strict=True):
            mean.add(tensors, weight)
        return layout.views(mean.result(dtype))


def _cut(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    if name.endswith(A_END):
        return tensor[:rank]
    return tensor[:, :rank].contiguous() if name.endswith(B_END) else tensor


def of_rank(tensors: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """Return the leading `rank` rows of every A and columns of every B."""
    return {n: _cut(n, t, rank) for n, t in tensors.items()}


def at_rank(layout: Layout, rank: int) -> Layout:
    """Return the layout of what `of_rank` returns."""
    cut = {A_END: lambda s: (min(rank, s[0]), s[1]), B_END: lambda s: (s[0], min(rank, s[1]))}
    shapes = {}
    for name, shape in layout.shapes.items():
        end = next((e for e in cut if name.endswith(e)), None)
        shapes[name] = torch.Size(cut[end](shape)) if end else shape
    return Layout(shapes)


def padded(tensors: Tensors, layout: Layout) -> dict[str, torch.Tensor]:
    """Pad factors of a lower rank with zero rows and columns to `layout`; other tensors are unchanged.

    Raises ValueError unless the tensors are factors of one rank of this layout.
    """
    ranks = {t.shape[0] if n.endswith(A_END) else t.shape[1] for n, t in tensors.items() if n.endswith((A_END, B_END))}
    check_names(at_rank(layout, max(ranks, default=0)), tensors)
    whole = {}
    for name, tensor in tensors.items():
        if tensor.shape == layout.shapes[name]:
            whole[name] = tensor
        else:
            whole[name] = tensor.new_zeros(layout.shapes[name])
            whole[name][tuple(slice(0, n) for n in tensor.shape)] = tensor
    return whole


def part_of(layout: Layout, names: Iterable[str]) -> Layout:
    """Return the layout of some of a layout's tensors."""
    return Layout({n: layout.shapes[n] for n in names})


def fill(adapter: Adapter, part: Layout, tensors: Tensors) -> None:
    """Copy the tensors of `part`, and no others, into `adapter`. Raises ValueError for other names or shapes."""
    check_names(part, tensors)
    for name in part.names:
        adapter.views[name].copy_(tensors[name])
