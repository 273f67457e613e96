"""FedOpt: the server uses the clients' mean change as a gradient, and steps with its own optimiser.

Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, Algorithm 2 (adaptive) and Algorithm 1 with SGD and
momentum, which is FedAvgM of Hsu et al., arXiv 1909.06335. With the pseudo-gradient d_t = θ_t − Σ_k p_k θ_k (the
paper's −Δ_t), every rule below keeps moments and computes a step u_t; θ_{t+1} = θ_t − u_t. As in the paper, there is no
bias correction, and v starts at τ². Clients do plain local training. The whole adapter travels, both ways; moments stay on
the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About, Sizes
from fedloom.algorithms.averaging import fedavg
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Layout, check_names

#: The moments of one tensor by name, fp64. A rule replaces them.
Moments = dict[str, torch.Tensor]


#: (d_t, moments, options) → u_t, all fp64.
Rule = Callable[[torch.Tensor, Moments, Any], torch.Tensor]


class ServerOptions(fedavg.FedAvg.Options):
    def initial(self) -> dict[str, float]:
        """Moment → the initial value of its numbers."""
        return {"m": 0.0}


class Momentum(ServerOptions):
    lr: float = Field(1.0, gt=0, description="η, the server's learning rate")
    momentum: float = Field(0.5, ge=0, lt=1, description="β; in the long run steps grow by 1/(1−β)")


class Accumulating(ServerOptions):
    lr: float = Field(
        1e-2, gt=0, description="η, the server's learning rate: about the largest change of a number in a round"
    )
    beta1: float = Field(0.0, ge=0, lt=1, description="β1: how slowly the mean of pseudo-gradients moves")
    tau: float = Field(1e-3, gt=0, description="τ: adaptivity; pseudo-gradients well below it are not scaled up")

    def initial(self) -> dict[str, float]:
        return {"m": 0.0, "v": self.tau**2}


class Adaptive(Accumulating):
    beta1: float = Field(0.9, ge=0, lt=1, description="β1: how slowly the mean of pseudo-gradients moves")
    beta2: float = Field(0.99, ge=0, lt=1, description="β2: how slowly the mean of their squares changes")


def heavy_ball(d: torch.Tensor, s: Moments, o: Momentum) -> torch.Tensor:
    """m_t = β m_{t−1} + d_t;  u_t = η m_t"""
    s["m"] = o.momentum * s["m"] + d
    return o.lr * s["m"]


def adagrad(d: torch.Tensor, s: Moments, o: Accumulating) -> torch.Tensor:
    """v_t = v_{t−1} + d_t²"""
    s["v"] = s["v"] + d.square()
    return _adaptive(d, s, o)


def adam(d: torch.Tensor, s: Moments, o: Adaptive) -> torch.Tensor:
    """v_t = β2 v_{t−1} + (1−β2) d_t²"""
    s["v"] = o.beta2 * s["v"] + (1 - o.beta2) * d.square()
    return _adaptive(d, s, o)


def yogi(d: torch.Tensor, s: Moments, o: Adaptive) -> torch.Tensor:
    """v_t = v_{t−1} − (1−β2) d_t² sign(v_{t−1} − d_t²)"""
    square = d.square()
    s["v"] = s["v"] - (1 - o.beta2) * square * torch.sign(s["v"] - square)
    return _adaptive(d, s, o)


def _adaptive(d: torch.Tensor, s: Moments, o: Accumulating) -> torch.Tensor:
    """m_t = β1 m_{t−1} + (1−β1) d_t;  u_t = η m_t / (√v_t + τ)"""
    s["m"] = o.beta1 * s["m"] + (1 - o.beta1) * d
    return o.lr * s["m"] / (s["v"].sqrt() + o.tau)


def _with_momentum(sizes: Sizes) -> int:
    return 2 * sizes.adapter


def _with_two_moments(sizes: Sizes) -> int:
    return 3 * sizes.adapter


class FedOpt(fedavg.FedAvg):
    """Base class of the algorithms below; each defines its rule, its moments and its options.

    The server keeps the moments, as ``moment/tensor``: fp32 tensors like the shared adapter's. Arithmetic is fp64, one
    tensor at a time.
    """

    Options: ClassVar[type[ServerOptions]] = ServerOptions
    rule: ClassVar[Rule]

    options: ServerOptions

    def server_model(self, models: Models) -> AdaptedModel:
        model = super().server_model(models)
        shapes = self.shared.layout.shapes.items()
        starts = self.options.initial().items()
        self.kept = Payload({f"{key}/{n}": torch.full(shape, start) for key, start in starts for n, shape in shapes})
        return model

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = self.mean_of(updates)
        gradient, before = float((mean - self.shared.flat).norm()), self.shared.flat.clone()
        for name, average in self.shared.layout.views(mean).items():
            m, theta = average.double(), self.shared.views[name]
            d = theta.double() - m
            kept = {key: self.kept.tensors[f"{key}/{name}"] for key in self.options.initial()}
            state = {key: moment.double() for key, moment in kept.items()}
            u = type(self).rule(d, state, self.options)
            # θ − u, computed from the mean: if the step is the pseudo-gradient itself, the result is the mean, bit for bit.
            theta.copy_(m + (d - u))
            for key, moment in kept.items():
                moment.copy_(state[key])
        return {"distance_moved": float((self.shared.flat - before).norm()), "pseudo_gradient": gradient}

    def load_server_state(self, state: Payload) -> None:
        wanted = Layout({n: t.shape for n, t in self.kept.tensors.items()})
        super().load_server_state(state)
        check_names(wanted, self.kept.tensors)


class FedAvgM(FedOpt):
    properties: ClassVar = base.Properties(linear_sum=True, neutral={"lr": 1.0, "momentum": 0.0})
    about: ClassVar = About(
        "averaging", "adapter, both ways", "Hsu et al. 2019, arXiv 1909.06335", server=_with_momentum
    )
    Options = Momentum
    rule: ClassVar[Rule] = staticmethod(heavy_ball)


class FedAdagrad(FedOpt):
    properties: ClassVar = base.Properties(linear_sum=True)
    about: ClassVar = About(
        "averaging", "adapter, both ways", "Reddi et al. 2020, arXiv 2003.00295", server=_with_two_moments
    )
    Options = Accumulating
    rule: ClassVar[Rule] = staticmethod(adagrad)


class FedAdam(FedOpt):
    properties: ClassVar = base.Properties(linear_sum=True)
    about: ClassVar = About(
        "averaging", "adapter, both ways", "Reddi et al. 2020, arXiv 2003.00295", server=_with_two_moments
    )
    Options = Adaptive
    rule: ClassVar[Rule] = staticmethod(adam)


class FedYogi(FedOpt):
    properties: ClassVar = base.Properties(linear_sum=True)
    about: ClassVar = About(
        "averaging", "adapter, both ways", "Reddi et al. 2020, arXiv 2003.00295", server=_with_two_moments
    )
    Options = Adaptive
    rule: ClassVar[Rule] = staticmethod(yogi)
