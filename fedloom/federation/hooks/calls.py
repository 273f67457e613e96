"""The hooks that a recipe names, called in its order: `Hooks` holds one side's, `FitHooks` walks through a fit's points.

State goes in and out here, so that a hook only reads and writes its `kept`. This file does not know what any hook does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fedloom.algorithms.base import Algorithm
from fedloom.common import registry
from fedloom.common.complaints import parse_options
from fedloom.data.batching import Batch
from fedloom.data.corpus import Partition
from fedloom.federation.hooks.base import CLIENT_POINTS, SERVER_POINTS, Hook, Pass, ServerRound, Step
from fedloom.messages.kept import check_kept
from fedloom.messages.names import prefixed
from fedloom.messages.types import Payload
from fedloom.models.adapters import AdaptedModel
from fedloom.models.layout import swap
from fedloom.recipe.recipe import HookConfig, Recipe

#: Where a client's store and the server's checkpoint have them.
SECTION = "hooks"


def parse_hook(config: HookConfig) -> Hook:
    """Build a recipe's hooks. Raises UserError for an unknown name or option."""
    cls: type[Hook] = registry.hooks.get(config.name)
    return cls(parse_options(cls.Options, config.options, f"the hook {config.name}"))


def check_hooks(recipe: Recipe, algorithm: Algorithm, clients: Partition) -> None:
    """Let every hook check the recipe. Raises UserError if a hook cannot be used with it.

    Args:
        algorithm: the server's half, with its model.
        clients: with their data.
    """
    for config in recipe.hooks:
        parse_hook(config).check(recipe, algorithm, clients)


def for_clients(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe for clients, without hooks that act only on the server."""
    own = [h for h in recipe.hooks if registry.hooks.get(h.name).points(CLIENT_POINTS)]
    return {**recipe.resolved(), "hooks": [h.model_dump(mode="json") for h in own]}


class Hooks:
    """One side's hooks, by name and in order; false where there are none.

    Args:
        points: the side's.
    """

    def __init__(self, hooks: Mapping[str, Hook] | None = None, points: Sequence[str] = ()) -> None:
        self._hooks = {name: h for name, h in (hooks or {}).items() if h.points(points)}
        self._at = {p: [h for h in self._hooks.values() if h.points((p,))] for p in points}
        self._steps_per_epoch: int | None = None

    @classmethod
    def of_client(cls, configs: Sequence[HookConfig]) -> Hooks:
        return cls({c.name: parse_hook(c) for c in configs}, CLIENT_POINTS)

    @classmethod
    def of_server(cls, configs: Sequence[HookConfig]) -> Hooks:
        return cls({c.name: parse_hook(c) for c in configs}, SERVER_POINTS)

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def call(self, point: str, at: Any) -> None:
        for hook in self._at.get(point, ()):
            getattr(hook, point)(at)

    def acts(self, point: str) -> bool:
        return bool(self._at.get(point))

    def numbers(self) -> dict[str, float]:
        """``hook/number`` → value, of this client's round or the server's. Raises ValueError for one that is not finite."""
        found = {f"{n}/{key}": float(v) for n, hook in self._hooks.items() for key, v in hook.numbers.items()}
        for key, value in found.items():
            if not math.isfinite(value):
                raise ValueError(f"the hook's number {key} is {value}: only finite ones are logged")
        return found

    def begin(self, client: str, round: int, state: Payload | None, steps_per_epoch: int | None = None) -> None:
        """It is `client`'s turn, with what its hooks kept.

        Args:
            steps_per_epoch: None where the client counts steps.
        """
        self._steps_per_epoch = steps_per_epoch
        self.load(state or Payload())
        for hook in self._hooks.values():
            hook.client, hook.round, hook.numbers = client, round, {}

    def fit(self, model: AdaptedModel, grad: torch.Tensor) -> FitHooks | None:
        """For one walk over optimiser steps by `grad`; None where nobody acts within."""
        inside = any(self.acts(p) for p in CLIENT_POINTS[1:-1])
        return FitHooks(self, model, grad, self._steps_per_epoch) if inside else None

    # ------------------------------------------------------------------ state

    def state(self) -> Payload:
        """What all of them kept, by ``hook/tensor``. Raises ValueError where something cannot be stored."""
        for name, hook in self._hooks.items():
            check_kept(hook.kept, f"self.kept of the hook {name}")
        tensors: dict[str, torch.Tensor] = {}
        for name, hook in self._hooks.items():
            tensors |= prefixed(hook.kept.tensors, f"{name}/")
        return Payload(tensors, {n: hook.kept.meta for n, hook in self._hooks.items() if hook.kept.meta})

    def load(self, state: Payload) -> None:
        for name, hook in self._hooks.items():
            hook.kept = Payload(state.under(f"{name}/"), dict(state.meta.get(name, {})))

    # ------------------------------------------------------------------ the server's round

    def round_start(self, at: ServerRound) -> None:
        for hook in self._hooks.values():
            hook.round, hook.numbers = at.number, {}
        self.call("round_start", at)

    def stopped_by(self, at: ServerRound) -> str:
        """`round_end`; the name of the first hook that wants this round to be the last, or the empty string."""
        for name, hook in self._hooks.items():
            hook.round_end(at)
            if at.stop:
                return name
        return ""

    def validates(self, round: int) -> bool:
        return any(hook.validates(round) for hook in self._hooks.values())

    def deploy(self, algorithm: Algorithm) -> None:
        """Put what a hook deploys into the server's state permanently, at the end of the run."""
        stand_in = self._stand_in(algorithm)
        if stand_in is not None:
            algorithm.shared.copy_(stand_in)

    @contextmanager
    def deploying(self, algorithm: Algorithm) -> Iterator[None]:
        """In this context, clients receive what a hook deploys. Afterwards the server's state is restored bit for bit."""
        stand_in = self._stand_in(algorithm)
        if stand_in is None:
            yield
            return
        swap(algorithm.shared.flat, stand_in)
        try:
            yield
        finally:
            swap(algorithm.shared.flat, stand_in)

    def _stand_in(self, algorithm: Algorithm) -> torch.Tensor | None:
        found = [t for hook in self._hooks.values() if (t := hook.deploys(algorithm)) is not None]
        return found[-1].to(algorithm.shared.flat) if found else None


class FitHooks:
    """The points of one walk over optimiser steps, in order."""

    def __init__(self, hooks: Hooks, model: AdaptedModel, grad: torch.Tensor, steps_per_epoch: int | None) -> None:
        self._call: Callable[[str, Any], None] = hooks.call
        self._model, self._grad = model, grad
        self._steps_per_epoch = steps_per_epoch
        self._step: Step | None = None
        self._pass: Pass

    def step(self, number: int, batches: Sequence[Batch], learning_rate: float) -> None:
        epoch = number // self._steps_per_epoch if self._steps_per_epoch else 0
        before, self._step = self._step, Step(self._model, self._grad, number, epoch, batches, learning_rate)
        if before is None or before.epoch != epoch:
            if before is not None:
                self._call("epoch_end", before)
            self._call("epoch_start", self._step)

    def batch(self, batch: Batch) -> None:
        assert self._step is not None
        self._pass = Pass(self._step, batch)
        self._call("batch_start", self._pass)

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        """Call `after_forward`; return the loss for the backward pass."""
        self._pass.loss = loss
        self._call("after_forward", self._pass)
        return self._pass.loss

    def backward(self) -> None:
        self._call("after_backward", self._pass)

    def before_step(self, loss: float) -> None:
        assert self._step is not None
        self._step.loss = loss
        self._call("before_step", self._step)

    def after_step(self) -> None:
        self._call("after_step", self._step)

    def end(self) -> None:
        if self._step is not None:
            self._call("epoch_end", self._step)
