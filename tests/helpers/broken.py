"""Algorithms for tests of fedloom.testing: one that keeps the contract, some that break it, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedloom.algorithms import About, Algorithm, FedAvg, Properties
from fedloom.messages import Payload
from fedloom.testing import ContractBroken, check_algorithm

ADAPTER = About("averaging", "adapter, both ways")


class Momentum(FedAvg):
    """A right one: the server steps with momentum, a client sends 16 bits and keeps the rest for later."""

    properties = Properties()
    about = About(
        "averaging", "adapter, both ways", server=lambda s: 2 * s.adapter, client=lambda s: s.adapter,
        up=lambda s: s.adapter // 2,
    )  # fmt: skip

    def shared_state(self) -> Payload:
        flat = self.model.adapter.flat.cpu() + self.kept.tensors.get("rest", torch.tensor(0.0))
        sent = flat.half()
        self.kept = Payload({"rest": flat - sent.float()})
        return Payload(self.model.adapter.layout.views(sent))

    def aggregate(self, updates):
        before = self.shared.flat.clone()
        super().aggregate(updates)
        step = self.shared.flat - before + 0.5 * self.kept.tensors.get("step", torch.tensor(0.0))
        self.kept.tensors["step"] = step
        self.shared.copy_(before + step)
        return {}


class ClientAttribute(FedAvg):
    about = ADAPTER
    owed: torch.Tensor | float = 0.0

    def receive(self, payload: Payload) -> None:
        super().receive(payload)
        self.start = self.model.adapter.flat.clone()

    def shared_state(self) -> Payload:
        change = self.model.adapter.flat - self.start + self.owed
        sent = change.sign() * change.abs().mean()
        self.owed = change - sent
        return Payload(self.model.adapter.layout.views(self.start + sent))


def problems(cls: type[Algorithm], only: list[str], **options: Any) -> list[str]:
    """The sentences of these checks, which must find something."""
    with pytest.raises(ContractBroken) as broken:
        check_algorithm(cls, only=only, **options)
    assert set(broken.value.report.problems) <= {*only, "run"}
    assert all(s in str(broken.value) for s in broken.value.report.sentences)
    return broken.value.report.sentences
