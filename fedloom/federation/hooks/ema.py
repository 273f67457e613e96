"""Keep an exponential moving average of the server's adapter over rounds; optionally evaluate and save the average.

With θ_t the server's adapter after round t and d the decay,

    m_t = d · m_{t−1} + (1 − d) · θ_t,   m_0 = 0
    θ̄_t = m_t / (1 − d^t)

The division is the bias correction of Kingma and Ba, "Adam", arXiv 1412.6980, section 3: θ̄_t is a weighted mean of the
rounds' results. Its weights add up to one, and it has nothing of the untrained start. Clients still train from θ: the
average changes what is deployed and not the training. With LoRA it averages the two factors. Their product is not the
mean of the products, but over rounds of one run both are close. m is stored in fp64 in the server's checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from fedloom.common.errors import UserError
from fedloom.data.corpus import Partition
from fedloom.federation.hooks.base import Hook, HookOptions, ServerRound
from fedloom.recipe.recipe import Recipe

if TYPE_CHECKING:
    from fedloom.algorithms.base import Algorithm


class Ema(Hook):
    """The hook. Its state: `mean` is m, [numel] float64; `rounds` is t."""

    class Options(HookOptions):
        decay: float = Field(0.8, ge=0, lt=1, description="d: the weight of the past; 1/(1−d) rounds count")
        deploy: bool = Field(True, description="measure and save the average; false only logs how far it lies away")

    options: Options
    tells_of_data: ClassVar = False  # computed from what is released anyway

    def check(self, recipe: Recipe, algorithm: Algorithm, clients: Partition) -> None:
        if not self._can_stand_in(algorithm):
            raise UserError(
                f"the hook ema averages the one adapter of a run, and the result of algorithm {recipe.algorithm.name} is "
                "something else (own models, a change of base weights, seeds): leave ema out, or use fedavg"
            )

    @staticmethod
    def _can_stand_in(algorithm: Algorithm) -> bool:
        """Whether the server's state is its adapter, and only that is deployed."""
        shared = {f"shared/{n}" for n in algorithm.shared.layout.names}
        deployed = algorithm.deployed()
        return (
            not algorithm.properties.personal
            and shared <= set(algorithm.server_state().tensors)
            and deployed.base_delta is None
            and torch.equal(deployed.adapter.flat, algorithm.shared.flat)
        )

    def aggregated(self, at: ServerRound) -> None:
        d, now = self.options.decay, at.algorithm.shared.flat.detach().cpu().double()
        mean = self.kept.tensors.get("mean", torch.zeros_like(now))
        rounds = int(self.kept.meta.get("rounds", 0)) + 1
        self.kept.tensors, self.kept.meta = {"mean": d * mean + (1 - d) * now}, {"rounds": rounds}
        self.numbers = {"distance": float((self._average() - now).norm())}

    def _average(self) -> torch.Tensor:
        """θ̄: [numel] float64."""
        return self.kept.tensors["mean"] / (1 - self.options.decay ** int(self.kept.meta["rounds"]))

    def deploys(self, algorithm: Algorithm) -> torch.Tensor | None:
        return self._average() if self.options.deploy and self.kept.tensors else None
