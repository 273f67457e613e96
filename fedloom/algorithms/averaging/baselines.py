"""The two baselines that bound what federation can do: each client alone, and all data in one place.

`local`: each client trains for rounds × steps steps on its own data; nothing is shared, so nothing travels. `global`: all
clients' training data is pooled in one place, which only a simulator can do. Training takes rounds × steps × sampled
clients steps. Both are evaluated on the same pooled test set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from fedloom.algorithms import base
from fedloom.algorithms.about import About, nothing, whole
from fedloom.algorithms.averaging import fedavg
from fedloom.messages.types import Payload, Update
from fedloom.models.layout import Layout


class Local(base.Algorithm):
    properties: ClassVar = base.Properties(personal=True, neutral={})
    about: ClassVar = About("baseline", "nothing", up=nothing, down=nothing, client=whole)

    def round_payload(self, client: str) -> Payload:
        return Payload()

    def receive(self, payload: Payload) -> None:
        if self.kept.tensors:
            self.model.adapter.load(self.kept.tensors)
        else:
            self.model.adapter.copy_(self.model.initial)

    def shared_state(self) -> Payload:
        self.kept = Payload({n: t.detach().cpu().clone() for n, t in self.model.adapter.tensors().items()})
        return Payload()

    def update_layout(self) -> Layout:
        return Layout({})

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        for _ in updates:
            pass
        return {}


class Global(fedavg.FedAvg):
    """Train one client that has the pooled data: the average of one client is plain fine-tuning."""

    properties: ClassVar = base.Properties(linear_sum=True, pooled=True, neutral={})
    about: ClassVar = About("baseline", "data, to one place")
