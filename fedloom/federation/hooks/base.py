"""A hook acts at named points of a run without being an algorithm: it watches, corrects a loss or a gradient, ends a run.

    client   fit_start ( epoch_start ( (batch_start after_forward after_backward)… before_step after_step )… epoch_end )…
             fit_end
    server   round_start (clients train) aggregated (validation is measured, where a hook asks for it) round_end

A hook overrides only the points that it uses; a point without a hook costs nothing. Its state is in `kept`. The server
half's state is stored in the server's checkpoint; a client half's state is stored with the client and never leaves it. A
client half reports only the numbers in `numbers`. A hook with points on both sides has two halves, like an algorithm: one
object on the server, and another that serves the clients one after another.

This file does not know which hooks a recipe names (calls.py), nor who calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from fedloom.common.errors import UserError
from fedloom.data.batching import Batch
from fedloom.data.corpus import Partition
from fedloom.messages.types import Payload
from fedloom.models.adapters import AdaptedModel
from fedloom.recipe.recipe import Recipe, TrainConfig

if TYPE_CHECKING:
    from fedloom.algorithms.base import Algorithm
    from fedloom.training.trainer import FitResult

CLIENT_POINTS = (
    "fit_start", "epoch_start", "batch_start", "after_forward", "after_backward", "before_step", "after_step",
    "epoch_end", "fit_end",
)  # fmt: skip


SERVER_POINTS = ("round_start", "aggregated", "round_end")


class HookOptions(BaseModel):
    """A hook's own options, next to its name in a recipe. Unknown options are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass
class Fit:
    """A client's training in one round. `result` is set at `fit_end`."""

    model: AdaptedModel
    config: TrainConfig
    result: FitResult | None = None


@dataclass
class Step:
    """One optimiser step.

    Attributes:
        grad: of what the optimiser steps, whole at `before_step`, where it may be written into: the adapter's, `model.grad`,
            or that of the numbers which an algorithm trains in its place (fed_sb, slora's first stage).
        number: from 0, in this walk over the data; `epoch` likewise (under `train.steps` a round is one epoch).
        batches: its forward passes.
        learning_rate: of this step.
        loss: of the whole step, once its passes are done.
    """

    model: AdaptedModel
    grad: torch.Tensor
    number: int
    epoch: int
    batches: Sequence[Batch]
    learning_rate: float
    loss: float = 0.0


@dataclass
class Pass:
    """One forward and backward pass. `loss` is set from `after_forward` on, where a hook may replace it.

    From `after_backward` on `step.model.grad` holds the gradient of the step's passes so far.
    """

    step: Step
    batch: Batch
    loss: torch.Tensor | None = None


@dataclass
class ServerRound:
    """A round, as the server sees it.

    Attributes:
        number, rounds: this one, and how many the recipe asks for.
        algorithm: the server's half; `shared` is what clients are given.
        validation: the mean loss of a token on the clients' validation data after this round; at `round_end`, where a
            hook asked for it.
        stop: a sentence, set by a hook at `round_end` that wants this round to be the last.
    """

    number: int
    rounds: int
    algorithm: Algorithm
    validation: float | None = None
    stop: str = ""


class Hook:
    """Subclass, override points, and name it in the registry (docs/extending.md adds one).

    Attributes:
        tells_of_data: what it makes tells more of a client's data than the model does, so a private recipe refuses it.
        kept: what it has to know later, tensors and JSON: loaded before its points are called, written after.
        numbers: name → what is logged, of the client's round or of the server's; empty again at the next one's start.
        client, round: client half: whose turn it is, and in which round.
    """

    tells_of_data: ClassVar[bool] = True
    Options: ClassVar[type[HookOptions]] = HookOptions

    def __init__(self, options: HookOptions) -> None:
        self.options = options
        self.kept = Payload()
        self.numbers: dict[str, float] = {}
        self.client = ""
        self.round = 0

    @classmethod
    def points(cls, among: Sequence[str]) -> tuple[str, ...]:
        """Return the points of `among` that this hook overrides."""
        return tuple(p for p in among if getattr(cls, p) is not getattr(Hook, p))

    def check(self, recipe: Recipe, algorithm: Algorithm, clients: Partition) -> None:
        """Raise UserError for a recipe that this hook cannot be used with. By default it can be used with all."""

    # ------------------------------------------------------------------ a client's points

    def fit_start(self, at: Fit) -> None:
        """A client's round begins; the model is as the server sent it."""

    def epoch_start(self, at: Step) -> None:
        """A pass over the client's data begins; under `train.steps` the round's steps are one."""

    def batch_start(self, at: Pass) -> None:
        """A forward pass is about to run."""

    def after_forward(self, at: Pass) -> None:
        """`at.loss` is this pass's share of its step's loss."""

    def after_backward(self, at: Pass) -> None:
        """The pass's gradient has been added to `at.step.model.grad`."""

    def before_step(self, at: Step) -> None:
        """The step's gradient, `at.grad`, is whole, and not yet clipped."""

    def after_step(self, at: Step) -> None:
        """The optimiser has moved the adapter."""

    def epoch_end(self, at: Step) -> None:
        """The epoch of `at`, its last step, is over."""

    def fit_end(self, at: Fit) -> None:
        """The client's training is over; nothing has been sent yet."""

    # ------------------------------------------------------------------ the server's points

    def round_start(self, at: ServerRound) -> None:
        """A round is about to begin."""

    def aggregated(self, at: ServerRound) -> None:
        """The updates are in the server's state, and the server's own step is done."""

    def round_end(self, at: ServerRound) -> None:
        """The round is evaluated, and nothing is written yet. Setting `at.stop` makes this round the last."""

    def validates(self, round: int) -> bool:
        """Whether to evaluate the clients' validation data after this round."""
        return False

    def deploys(self, algorithm: Algorithm) -> torch.Tensor | None:
        """Return what to evaluate and save in place of `algorithm.shared`: [numel]; None changes nothing."""
        return None


def check_validation(name: str, recipe: Recipe, clients: Partition) -> None:
    """Raise UserError if no client has validation data, for hooks that need it."""
    if not any(shard.validation for shard in clients.shards.values()):
        raise UserError(
            f"the hook {name} goes by validation data, and split.validation={recipe.split.validation:g} gives no client "
            "any: set split.validation=0.1"
        )
