"""DiLoCo: long local training with AdamW, and an outer step with Nesterov momentum on the clients' mean change.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv 2311.08105, Algorithm 1
with the outer optimiser that the paper recommends. With d_t = θ_t − Σ_k p_k θ_k:

    m_t = β m_{t−1} + d_t        θ_{t+1} = θ_t − η (d_t + β m_t)

In the paper all clients have the same weight, and keep their AdamW state between rounds: set
train.optimizer_state=keep for the latter. The whole adapter travels, both ways; the momentum stays on the server.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.averaging.fedopt import FedOpt, Moments, Rule, ServerOptions


def nesterov(d: torch.Tensor, s: Moments, o: DiLoCo.Options) -> torch.Tensor:
    """m_t = β m_{t−1} + d_t;  u_t = η (d_t + β m_t)"""
    s["m"] = o.momentum * s["m"] + d
    return o.lr * (d + o.momentum * s["m"])


class DiLoCo(FedOpt):
    properties: ClassVar = base.Properties(linear_sum=True, neutral={"lr": 1.0, "momentum": 0.0})
    about: ClassVar = About(
        "averaging", "adapter, both ways", "Douillard et al. 2023, arXiv 2311.08105", server=lambda s: 2 * s.adapter
    )
    rule: ClassVar[Rule] = staticmethod(nesterov)

    class Options(ServerOptions):
        lr: float = Field(0.7, gt=0, description="η, the outer learning rate")
        momentum: float = Field(
            0.9,
            ge=0,
            lt=1,
            description="β; in the long run steps grow by 1/(1−β), so use a smaller value for few rounds",
        )
