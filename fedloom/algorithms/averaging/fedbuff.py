"""FedBuff: the server does not wait for its clients. It aggregates whenever K updates have arrived, however old they are.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", arXiv 2106.06639, Algorithm 1. A client that
started from version v of the model sends the change Δ_k = θ_k − θ_v. An update that arrives when the model is at
version t is τ_k = t − v versions old. With K of them in the buffer

    θ_{t+1} = θ_t + η_g Σ_k p_k s(τ_k) Δ_k        p_k = n_k / Σ_j n_j over the buffer,   s(τ) = (1 + τ)^(−a)

The paper has p_k = 1/K (its Δ has the other sign) and a = 1/2. s is not in the denominator, as in the
paper, so a buffer of stale updates makes a shorter step.

Differences are fp32 on the wire, sums are fp64. θ_t + Σ p_k (θ_k − θ_t) is FedAvg's Σ p_k θ_k except for the rounding of
each difference, at most 2⁻²⁴ of it: on the first numbers of a run the two agree within one unit in the last place, but
not bit for bit. The whole adapter travels down and its difference travels up. The server keeps no older version.

The rule is a sum, but does not declare `linear_sum`, so it cannot be made private: updates and the denominator have
different weights, a client may be in one buffer twice, and no clients are sampled for a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.averaging import fedavg
from fedloom.messages.types import Payload, Update
from fedloom.models.layout import WeightedMean


class FedBuff(fedavg.FedAvg):
    """The server keeps `version`: how often it has aggregated. A client starts from version `Assignment.round` − 1."""

    properties: ClassVar = base.Properties(order_independent=False, asynchronous=True)
    about: ClassVar = About("averaging", "adapter; its change up", "Nguyen et al. 2021, arXiv 2106.06639")

    class Options(fedavg.FedAvg.Options):
        buffer: int | float = Field(
            0.5, gt=0, description="K, updates that make a round: a number, or a fraction of the clients in flight"
        )
        lr: float = Field(1.0, gt=0, description="η_g, the server's learning rate")
        staleness: float = Field(
            0.5, ge=0, description="a: an update that is τ versions old counts (1+τ)^(−a); 0 gives all the same weight"
        )

        @field_validator("buffer")
        @classmethod
        def _number_or_fraction(cls, value: int | float) -> int | float:
            if isinstance(value, float) and value >= 1 and not value.is_integer():
                raise ValueError("it is neither a whole number nor a fraction below 1: use such as 4 or 0.5")
            return int(value) if value >= 1 else value

    options: Options

    # ------------------------------------------------------------------ server

    @property
    def version(self) -> int:
        return int(self.kept.meta.get("version", 0))

    def buffer(self, in_flight: int) -> int:
        wanted = self.options.buffer
        return max(1, round(wanted * in_flight)) if isinstance(wanted, float) else wanted

    def staleness(self, update: Update) -> int:
        """τ: how many versions old this update is."""
        return self.version - (update.round - 1)

    def accept(self, update: Update) -> None:
        super().accept(update)
        if not 0 <= self.staleness(update) <= self.version:
            raise ValueError(f"it starts from version {update.round - 1}; expected one from 0 to {self.version}")

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean, ages = WeightedMean(self.shared.layout), []
        for update in updates:
            tau = self.staleness(update)
            mean.add(update.payload.tensors, self.options.weight(update), (1 + tau) ** -self.options.staleness)
            ages.append(tau)
        step = self.options.lr * mean.result(torch.float64)
        before = self.shared.flat.clone()
        self.shared.copy_(before.double() + step)
        self.kept.meta["version"] = self.version + 1
        moved = float((self.shared.flat - before).norm())
        return {"distance_moved": moved, "staleness": sum(ages) / len(ages), "oldest": max(ages)}

    # ------------------------------------------------------------------ client

    def receive(self, payload: Payload) -> None:
        super().receive(payload)
        self._start = None if self.evaluating else self.model.adapter.flat.clone()

    def shared_state(self) -> Payload:
        assert self._start is not None
        change: dict[str, Any] = self.model.adapter.layout.views(self.model.adapter.flat - self._start)
        return Payload(change)
