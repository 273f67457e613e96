"""SCAFFOLD: each client corrects its gradient by its difference from the mean, so that local steps do not drift apart.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv 1910.06378, Algorithm 1,
option II. Client k keeps a control variate c_k, an estimate of its own gradient; the server keeps c.

    local step   g ← g_k(y) − c_k + c                              equation 3
    afterwards   c_k⁺ = c_k − c + (θ_t − y_K) / (K η)              equation 4, option II
    server       θ ← Σ_k p_k y_k,   c ← Σ_k p_k c_k                equation 5

With plain SGD, option II is exactly the mean of the raw g_k along the local path (the sum telescopes). This file computes
that mean. It is a gradient also with AdamW, momentum, clipping and schedules; a difference of weights is not. The
correction is applied before clipping.

Weights. p_k = n_k / Σ n_j over the clients that were counted so far, with n_k as first reported. So c = Σ_k p_k c_k after
every round and for any sampling. (The paper divides by the number of all clients, which the server here does not know in
advance; with full participation both are the same.)

Traffic: θ and c travel down, with the last counted round of this client in the metadata; y_K and Δc_k travel up. c_k stays
with the client. The client adds Δc_k to it once the server reports that the update was counted. So an update that was late
or rejected changes neither side's control variate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.averaging import fedavg
from fedloom.messages.names import prefixed
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Adapter, Layout, WeightedMean

CONTROL = "control/"


PENDING = "pending/"


class Scaffold(fedavg.FedAvg):
    properties: ClassVar = base.Properties(neutral={})
    about: ClassVar = About(
        "averaging",
        "adapter and control",
        "Karimireddy et al. 2019, arXiv 1910.06378",
        up=lambda s: 2 * s.adapter,
        down=lambda s: 2 * s.adapter,
        server=lambda s: 3 * s.adapter,
        client=lambda s: 3 * s.adapter,
    )

    # ------------------------------------------------------------------ server

    def server_model(self, models: Models) -> AdaptedModel:
        model = super().server_model(models)
        self._sum = torch.zeros(self.shared.layout.numel, dtype=torch.float64)  # Σ n_k c_k
        self._counted: dict[str, tuple[int, int]] = {}  # client → (n_k, its last round that was counted)
        return model

    def control(self) -> torch.Tensor:
        """c = Σ n_k c_k / Σ n_k: [numel] fp32."""
        total = sum(weight for weight, _ in self._counted.values())
        return (self._sum / max(1, total)).float()

    def round_payload(self, client: str) -> Payload:
        control = self.shared.layout.views(self.control())
        _, counted = self._counted.get(client, (0, 0))
        return Payload({**self.shared.tensors(), **prefixed(control, CONTROL)}, {"counted": counted})

    def update_layout(self) -> Layout:
        shapes = self.shared.layout.shapes
        return Layout({**shapes, **prefixed(shapes, CONTROL)})

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = WeightedMean(self.shared.layout)
        total, counted = self._sum.clone(), dict(self._counted)  # the round's later clients are still sent the old c
        views = self.shared.layout.views(total)
        for update in updates:
            weight = self.options.weight(update)
            mean.add(update.payload.without(CONTROL), weight)
            first, _ = counted.get(update.client, (weight, 0))
            for name, change in update.payload.under(CONTROL).items():
                views[name].add_(change.to("cpu", torch.float64), alpha=first)
            counted[update.client] = (first, update.round)
        result = mean.result()
        moved = float((result - self.shared.flat).norm())
        self.shared.copy_(result)
        self._sum, self._counted = total, counted
        return {"distance_moved": moved, "control_norm": float(self.control().norm())}

    def server_state(self) -> Payload:
        state = super().server_state()
        state.tensors.update(prefixed(self.shared.layout.views(self._sum), "sum/"))
        # One entry per client is too much for metadata.
        state.tensors["counted"] = torch.tensor(list(json.dumps(self._counted).encode()), dtype=torch.uint8)
        return state

    def load_server_state(self, state: Payload) -> None:
        self.load_shared(state)
        for name, view in self.shared.layout.views(self._sum).items():
            view.copy_(state.tensors[f"sum/{name}"])
        counted = json.loads(bytes(state.tensors["counted"].tolist()))
        self._counted = {client: (weight, round) for client, (weight, round) in counted.items()}

    # ------------------------------------------------------------------ client

    def receive(self, payload: Payload) -> None:
        layout, device = self.model.adapter.layout, self.model.device
        super().receive(Payload(payload.without(CONTROL)))
        control = Adapter(layout)
        control.load(payload.under(CONTROL))
        self._own = self._own_control(int(payload.meta["counted"]))
        self._correction = (control.flat - self._own.float()).to(device)  # c − c_k
        self._path = torch.zeros(layout.numel, device=device)  # Σ g_k(y) over the steps taken
        self._steps = 0

    def _own_control(self, counted: int) -> torch.Tensor:
        """Return c_k as the server has it, [numel] fp64: with the last change only if that was counted."""
        flat = torch.zeros(self.model.adapter.layout.numel, dtype=torch.float64)
        kept = self.kept.tensors
        if kept:
            for name, view in self.model.adapter.layout.views(flat).items():
                view.copy_(kept[f"{CONTROL}{name}"])
                if self.kept.meta["round"] == counted:
                    view.add_(kept[f"{PENDING}{name}"])
        return flat

    def before_step(self, model: AdaptedModel) -> None:
        self._raw = model.grad.clone()
        model.grad.add_(self._correction)

    def after_step(self, model: AdaptedModel) -> None:  # not called for a step that was skipped
        self._path.add_(self._raw)
        self._steps += 1

    def shared_state(self) -> Payload:
        layout = self.model.adapter.layout
        mean = self._path.cpu().double() / max(1, self._steps)  # c_k⁺
        change = layout.views((mean - self._own).float())
        self.kept = Payload(
            {**prefixed(layout.views(self._own), CONTROL), **prefixed(change, PENDING)}, {"round": self.round}
        )
        return Payload({**self.model.adapter.tensors(), **prefixed(change, CONTROL)})
