"""The interface of every algorithm: one class has both halves, server and client, and four steps connect them.

    server                                            client
    server_model     model pre-processing             client_model
    initial_payload  initial broadcast         ─────▶ receive
    aggregate, server_step                     ◀───── shared_state     (after local training with local_loss)
    round_payload    re-distribution           ─────▶ receive
    deployed         what is evaluated and saved      deployed

One instance is the server's half, another a client's. In the simulator one client instance trains all clients, one after
another. Each half puts what it must remember between rounds into `kept`. The server's `kept` is in every checkpoint. A
client's is stored with that client, loaded before its local training and saved after it. An algorithm does not know
which runtime it is in. A tensor leaves a client only through `shared_state`. The defaults below are plain federated
training of the whole adapter; an algorithm overrides only what it changes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from fedloom.algorithms.about import About
from fedloom.data.batching import Batch
from fedloom.messages.kept import check_kept
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Adapter, Layout, all_finite, check_names, joint_window
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.objectives import unit_losses
from fedloom.training.trainer import FitResult, LocalRun


class AlgorithmOptions(BaseModel):
    """An algorithm's own options, which a recipe gives next to its name. Unknown options are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Deployed:
    """What is evaluated and saved: an adapter and, if the algorithm changes base weights, their delta."""

    adapter: Adapter
    base_delta: Mapping[str, torch.Tensor] | None = None

    def sha256(self) -> str:
        """Return the sha256 (hex) of all deployed tensors: the adapter's and then the delta's, each in name order."""
        if not self.base_delta:
            return self.adapter.sha256()
        digest = hashlib.sha256(self.adapter.flat.detach().cpu().numpy().tobytes())
        for name, tensor in sorted(self.base_delta.items()):
            digest.update(name.encode() + tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()


#: All strategies of training/parallel.py.
ANY_PARALLEL = frozenset({"ddp", "fsdp"})


#: Prefix of the names of `shared` in a checkpoint. `RESERVED`: prefixes of the state of hooks and of privacy there.
SHARED = "shared/"
RESERVED = ("hooks/", "privacy/")


@dataclass(frozen=True)
class Properties:
    """What an algorithm declares. The contract suite tests each property.

    Attributes:
        linear_sum: the server needs only Σ w_k x_k, so the algorithm streams and can be made private.
        order_independent: the result does not depend on the order in which clients are listed.
        exact: aggregation gives the mean of what clients learned, not an approximation.
        personal: each client ends with its own model; these are evaluated and saved.
        pooled: a baseline that trains on all clients' data in one place (simulator only).
        mixed_ranks: each client may have its own rank (adapter.ranks).
        asynchronous: the server does not wait for all clients. `buffer` updates make a round; some start from older models.
        streams: aggregation reads one update at a time; otherwise it keeps all updates of a round in memory.
        methods: the PEFT methods that it supports; None means all.
        neutral: options with which a run of one client equals plain local training.
        offsite: clients have an emulator instead of the model. They evaluate the emulator; the server evaluates the
            full model.
        cohorts: several clients may train in one pass (train.cohort). They must train the adapter only, by gradients,
            and any change to the base must be the same for all clients of a round.
        parallel: how several ranks may train one client (training/parallel.py). None means every way if
            `local_training` is the default, and no way if it is overridden. An algorithm that computes its own losses
            or gradients declares this once it uses `LocalRun.ranks`. If it writes into base weights, they cannot be
            sharded.
        weights: it reads, sends or changes base weights, which then cannot be quantised.
    """

    linear_sum: bool = False
    order_independent: bool = True
    exact: bool = False
    personal: bool = False
    pooled: bool = False
    mixed_ranks: bool = False
    asynchronous: bool = False
    streams: bool = True
    methods: frozenset[str] | None = None
    neutral: Mapping[str, Any] | None = None
    offsite: bool = False
    cohorts: bool = True
    parallel: frozenset[str] | None = None
    weights: bool = False


class Algorithm(ABC):
    """Subclass, override what differs, and name it in the registry (docs/extending.md adds one).

    Attributes:
        properties: what the algorithm declares; tests check it.
        about: the algorithm's description in tables. A class has its own, or none; it is not inherited.
        adapter: the recipe's `adapter` section: method, rank and each client's own rank.
        model: this process's model; set by `server_model` or `client_model`.
        shared: the server's copy of what all clients share, on the CPU; set by `server_model`.
        kept: what this half remembers between rounds, tensors and JSON (messages/kept.py). The server's is part of every
            checkpoint and is restored on resume. A client's stays with that client and is never sent. Restored tensors
            are on the CPU. Every other attribute of `self` is lost when the run is killed.
        client, round: client half: which client trains, and in which round.
        evaluating: client half: whether the live model is evaluated or saved next, not trained. In that case `receive`
            of a personal algorithm loads the client's own weights.
    """

    properties: ClassVar[Properties] = Properties()
    about: ClassVar[About]
    Options: ClassVar[type[AlgorithmOptions]] = AlgorithmOptions

    def __init__(self, options: AlgorithmOptions, seed: int, adapter: AdapterConfig) -> None:
        self.options = options
        self.seed = seed
        self.adapter = adapter
        self.model: AdaptedModel
        self.shared: Adapter
        self.kept = Payload()
        self.client = ""
        self.round = 0
        self.evaluating = False

    @classmethod
    def strategies(cls) -> frozenset[str]:
        """How several ranks may train one client: as declared, otherwise as `Properties.parallel` says for None."""
        if cls.properties.parallel is not None:
            return cls.properties.parallel
        return ANY_PARALLEL if cls.local_training is Algorithm.local_training else frozenset()

    @classmethod
    def check(cls, options: Any, adapter: AdapterConfig, train: TrainConfig, model: ModelConfig) -> None:
        """Reject a recipe that this algorithm cannot run, from its settings alone, before anything is loaded.

        Raises UserError that names the setting and how to fix it. By default every recipe is accepted.
        """

    # ------------------------------------------------------------------ model pre-processing

    def server_model(self, models: Models) -> AdaptedModel:
        """Build the model that the server evaluates. Sets `model` and `shared`."""
        self.model = models.adapted()
        self.shared = self.model.initial_adapter()
        return self.model

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        """Build the model that a client trains, once, from its first payload. Sets `model`."""
        self.model = models.adapted()
        return self.model

    # ------------------------------------------------------------------ initial broadcast, re-distribution

    @property
    def own_initial(self) -> bool:
        """Whether a client's first payload differs from later ones, such as an emulator. A restart sends it again."""
        return type(self).initial_payload is not Algorithm.initial_payload

    def initial_payload(self, client: str) -> Payload:
        """Return a client's first payload. By default the same as in every round."""
        return self.round_payload(client)

    def round_payload(self, client: str) -> Payload:
        """Return what a client receives before it trains or evaluates. By default the whole of `shared`."""
        return Payload(self.shared.tensors())

    # ------------------------------------------------------------------ shared-parameter aggregation

    @abstractmethod
    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        """Aggregate this round's updates, in client order, into the server's state; returns metrics to log.

        `updates` can be read once, so a rule that sums needs memory for one update only. While it is read, the round's
        later clients are still sent their payloads: change nothing that `round_payload` reads before the iterator is
        exhausted.
        """

    def buffer(self, in_flight: int) -> int:
        """How many updates make a round while `in_flight` clients work. Only asynchronous algorithms need it."""
        return in_flight

    def update_layout(self) -> Layout | None:
        """Names and shapes that an update must have; None if they differ between clients."""
        return self.shared.layout

    def accept(self, update: Update) -> None:
        """Reject an update with unexpected names or shapes, or with numbers that are not finite, before `aggregate`.

        Raises ValueError, which the coordinator turns into a `Failure` of that client.
        """
        layout = self.update_layout()
        if layout is not None:
            check_names(layout, update.payload.tensors)
        floats = {n: t for n, t in update.payload.tensors.items() if t.is_floating_point()}
        whole = joint_window(list(floats.values()))
        if whole is not None and all_finite(whole):
            return
        for name, tensor in floats.items():
            if not all_finite(tensor):
                raise ValueError(f"{name} has numbers that are not finite")

    def server_step(self) -> None:
        """Train on the server after aggregation, such as aligning an emulator. By default nothing."""

    # ------------------------------------------------------------------ the client half

    def receive(self, payload: Payload) -> None:
        """Put the live model into the state that training or evaluation starts from."""
        self.model.adapter.load(payload.tensors)

    def local_training(self, run: LocalRun) -> FitResult:
        """Train the live model for this round. By default optimiser steps on `local_loss`."""
        return run.fit(self)

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor:
        """Return this batch's contribution to the loss of its optimiser step: a scalar to call backward on.

        Args:
            step_units: supervised tokens, or pairs, in the whole step with gradient accumulation. Contributions add
                up to the step's loss, so multiply a penalty on the weights by `batch.units / step_units`.
        """
        return unit_losses(model, batch).sum() / step_units

    def before_step(self, model: AdaptedModel) -> None:
        """Correct the step's gradient in `model.grad`, before it is clipped. By default nothing."""

    def after_step(self, model: AdaptedModel) -> None:
        """Change `model.adapter` after the optimiser step, such as a projection. By default nothing."""

    def shared_state(self) -> Payload:
        """Return what the client sends after training. By default the whole adapter."""
        return Payload(self.model.adapter.tensors())

    # ------------------------------------------------------------------ result and state

    def deployed(self, client: str | None = None) -> Deployed:
        """Return the server's result, or with `client` (client half) the adapter of the live model."""
        return Deployed((self.shared if client is None else self.model.adapter).snapshot())

    def server_state(self) -> Payload:
        """Return everything that the server needs to continue after this round: `shared` and `kept`.

        Override it, together with `load_server_state`, only to store less, such as the numbers that determine `shared`.
        Raises ValueError if `kept` cannot be stored.
        """
        if self.kept != Payload():
            check_kept(self.kept, f"self.kept of {type(self).__name__}", reserved=(SHARED, *RESERVED))
        return Payload({**self.shared.tensors(SHARED), **self.kept.tensors}, dict(self.kept.meta))

    def load_server_state(self, state: Payload) -> None:
        """Restore a `server_state`. Raises ValueError if a tensor of `shared` is missing or has another shape."""
        self.load_shared(state)
        self.kept = Payload(state.without(SHARED), dict(state.meta))

    def load_shared(self, state: Payload) -> None:
        """Restore `shared` only, for algorithms that override `load_server_state`."""
        self.shared.load(state.under(SHARED))

    def repeated(self, rounds: int) -> bool:
        """React to a resume: `rounds` rounds after this state were finished before the interruption and are repeated.

        Returns whether the state changed; if so, it is written at once.
        """
        return False

    def guarantee(self) -> Mapping[str, Any] | None:
        """Return the privacy guarantee per client so far, as JSON values (docs/run-folder.md), or None."""
        return None

    def left_server(self) -> Mapping[str, int] | None:
        """Return parameters and bytes of the model that a client received, and of the full model (`offsite` only)."""
        return None

    def compared_with(self) -> Mapping[str, Any] | None:
        """Return the `algorithm` section of an ordinary run to compare this one with; None for no such run."""
        return None

    def begin(self, client: str, round: int, kept: Payload | None) -> None:
        """Switch this half to `client` in `round` (in evaluation: rounds finished) and restore what that client kept."""
        self.client = client
        self.round = round
        self.kept = kept or Payload()

    def client_state(self) -> Payload:
        """Return what stays with the client after training; by default `kept`. It is never part of a message.

        Raises ValueError if `kept` cannot be stored.
        """
        if self.kept != Payload():
            check_kept(self.kept, f"self.kept of {type(self).__name__}")
        return self.kept
