"""The base delta: the sum over all rounds of what an algorithm adds to base weights, and how it travels.

For each weight, the sum of low-rank changes is stored as two fp32 factors. When they become larger than the weight itself,
they are compressed by QR and SVD, to 1e-7 of the sum. If they are still larger than the weight, the dense sum is stored
instead. So a delta is never larger than the weights it changes, and after n rounds of rank R a client receives at most
n·R·(in + out) numbers per weight. The whole delta travels with every assignment, so a client that joins late, or only
evaluates, has all of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedloom.algorithms import base
from fedloom.algorithms.lora.base import LoRAAlgorithm
from fedloom.messages.names import prefixed, under
from fedloom.messages.types import Payload
from fedloom.models.lowrank import LowRank
from fedloom.recipe.recipe import AdapterConfig

PREFIX = "delta/"


class BaseDelta:
    """Base weight → the sum of the changes to it."""

    def __init__(self) -> None:
        self._low: dict[str, LowRank] = {}
        self._dense: dict[str, torch.Tensor] = {}

    def add(self, weight: str, change: LowRank) -> None:
        """Add a change, in float64, to the delta of `weight`."""
        if change.rank == 0:
            return
        if weight in self._dense:
            self._dense[weight] = (self._dense[weight].double() + change.dense()).float()
            return
        if weight in self._low:
            change = self._low[weight].double().plus(change)
        if self._outgrown(change):
            change = change.compact()
        if self._outgrown(change):
            self._low.pop(weight, None)
            self._dense[weight] = change.dense().float()
        else:
            self._low[weight] = change.single()

    @staticmethod
    def _outgrown(change: LowRank) -> bool:
        """Whether the factors have more numbers than their product."""
        rows, columns = change.b.shape[0], change.a.shape[1]
        return change.rank * (rows + columns) > rows * columns

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the delta for `AdaptedModel.set_base_delta`: ``weight.B`` and ``weight.A``, or ``weight``."""
        low = {f"{w}.{side}": t for w, part in self._low.items() for side, t in (("B", part.b), ("A", part.a))}
        return dict(sorted({**low, **self._dense}.items()))

    def prefixed(self) -> dict[str, torch.Tensor]:
        """`tensors` under the names that a payload or a state carries them by."""
        return prefixed(self.tensors(), PREFIX)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> BaseDelta:
        """From the prefixed tensors among `tensors`."""
        delta = cls()
        found = under(tensors, PREFIX)
        for name, tensor in found.items():
            stem = name.removesuffix(".B").removesuffix(".A")
            if stem == name:
                delta._dense[name] = tensor
            elif f"{stem}.B" not in found or f"{stem}.A" not in found:
                raise ValueError(f"the base delta has {name} without its other factor")
            else:
                delta._low[stem] = LowRank(found[f"{stem}.B"], found[f"{stem}.A"])
        return delta


class DeltaAlgorithm(LoRAAlgorithm):
    """Base class of algorithms with a base delta: every payload, state and result has the whole delta."""

    def __init__(self, options: base.AlgorithmOptions, seed: int, adapter: AdapterConfig) -> None:
        super().__init__(options, seed, adapter)
        self.delta = BaseDelta()

    def round_payload(self, client: str) -> Payload:
        return Payload({**super().round_payload(client).tensors, **self.delta.prefixed()})

    def receive(self, payload: Payload) -> None:
        super().receive(Payload(payload.without(PREFIX)))
        self.delta = BaseDelta.of(payload.tensors)
        self.model.set_base_delta(self.delta.tensors())

    def deployed(self, client: str | None = None) -> base.Deployed:
        return base.Deployed(super().deployed(client).adapter, self.delta.tensors())

    def server_state(self) -> Payload:
        return Payload({**super().server_state().tensors, **self.delta.prefixed()})

    def load_server_state(self, state: Payload) -> None:
        self.load_shared(state)
        self.delta = BaseDelta.of(state.tensors)
