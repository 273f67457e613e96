"""A small algorithm for tests, which uses what no shipped one does yet: the base-delta channel, and a server step.

After each round the averaged A and B are merged into the base weights as factors, and every client starts the next round
with a fresh B = 0. The model's function is that of FedAvg's adapter after one round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.averaging import fedavg
from fedloom.messages.types import Payload, Update

PREFIX, DELTA = "base_model.model.", "delta/"


class Merging(fedavg.FedAvg):
    properties: ClassVar = base.Properties()

    def server_model(self, models):
        model = super().server_model(models)
        self.delta: dict[str, torch.Tensor] = {}
        config = model.module.peft_config["default"]
        self.scale = config.lora_alpha / config.r
        return model

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        return super().aggregate(updates)

    def server_step(self) -> None:
        """W ← W + s·B·A, stacked as factors; B ← 0."""
        for name, view in self.shared.views.items():
            if ".lora_A." not in name:
                continue
            weight = name.removeprefix(PREFIX).replace(".lora_A.", ".")
            b = self.shared.views[name.replace(".lora_A.", ".lora_B.")]
            for key, new, dim in ((f"{weight}.B", self.scale * b, 1), (f"{weight}.A", view, 0)):
                known = [self.delta[key]] if key in self.delta else []
                self.delta[key] = torch.cat([*known, new.clone()], dim=dim)
        self.shared.flat.copy_(self.model.initial)

    def round_payload(self, client: str) -> Payload:
        return Payload({**self.shared.tensors(), **{DELTA + n: t for n, t in self.delta.items()}})

    def receive(self, payload: Payload) -> None:
        delta = {n.removeprefix(DELTA): t for n, t in payload.tensors.items() if n.startswith(DELTA)}
        self.model.set_base_delta(delta)
        self.model.adapter.load({n: t for n, t in payload.tensors.items() if not n.startswith(DELTA)})

    def deployed(self, client: str | None = None) -> base.Deployed:
        return base.Deployed(super().deployed(client).adapter, self.delta if client is None else None)

    def server_state(self) -> Payload:
        state = super().server_state()
        return Payload({**state.tensors, **{DELTA + n: t for n, t in self.delta.items()}})

    def load_server_state(self, state: Payload) -> None:
        self.load_shared(state)
        self.delta = {n.removeprefix(DELTA): t for n, t in state.tensors.items() if n.startswith(DELTA)}


class Keeping(fedavg.FedAvg):
    """A test's personal algorithm with a shared part: A is averaged, B stays with its client (FedSA-LoRA's split)."""

    properties: ClassVar = base.Properties(personal=True)

    def _private(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t for n, t in tensors.items() if ".lora_B." in n}

    def round_payload(self, client: str) -> Payload:
        return Payload({n: t for n, t in self.shared.tensors().items() if ".lora_A." in n})

    def update_layout(self):
        return base.Layout({n: s for n, s in self.shared.layout.shapes.items() if ".lora_A." in n})

    def receive(self, payload: Payload) -> None:
        own = self.kept.tensors or self._private(self.model.adapter.layout.views(self.model.initial))
        self.model.adapter.load({**payload.tensors, **own})

    def shared_state(self) -> Payload:
        live = self.model.adapter.tensors()
        self.kept = Payload({n: t.detach().cpu().clone() for n, t in self._private(live).items()})
        return Payload({n: t for n, t in live.items() if ".lora_A." in n})

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = base_mean(self.update_layout(), updates)
        for name, view in mean.items():
            self.shared.views[name].copy_(view)
        return {}


def base_mean(layout, updates: Iterator[Update]) -> dict[str, torch.Tensor]:
    from fedloom.models.layout import WeightedMean

    mean = WeightedMean(layout)
    for update in updates:
        mean.add(update.payload.tensors, update.num_examples)
    return layout.views(mean.result())
