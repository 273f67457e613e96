"""The unified interface: one class holds both halves of a federated algorithm, four steps connect them.

    server                                            client
    server_model     model pre-processing             client_model
    initial_payload  initial broadcast         ─────▶ receive
    aggregate, server_step                     ◀───── shared_state     (after local training with local_loss)
    round_payload    re-distribution           ─────▶ receive
    deployed         what is evaluated and saved      deployed

One instance plays the server, another a client; in the simulator the client's instance plays all clients in turn. What
either has to remember from round to round it puts into `kept`. The server's `kept` is in every checkpoint. A client's is
stored with that client, loaded before its turn and saved after it. An algorithm never asks which runtime it is in, and a
tensor leaves a client only through `shared_state`. The defaults below are plain federated training of the whole adapter;
an algorithm overrides what it changes and nothing else.
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
from fedloom.messages.names import prefixed
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Adapter, Layout, all_finite, check_names, one_window
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.objectives import unit_losses
from fedloom.training.trainer import FitResult, LocalRun


class AlgorithmOptions(BaseModel):
    """An algorithm's own options, which stand beside its name in a recipe. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Deployed:
    """What is evaluated and saved: an adapter and, where the algorithm changes base weights, their delta."""

    adapter: Adapter
    base_delta: Mapping[str, torch.Tensor] | None = None

    def sha256(self) -> str:
        """sha256 (hex) of all deployed tensors: the adapter's alone, or its and the delta's, each in name order."""
        if not self.base_delta:
            return self.adapter.sha256()
        digest = hashlib.sha256(self.adapter.flat.detach().cpu().numpy().tobytes())
        for name, tensor in sorted(self.base_delta.items()):
            digest.update(name.encode() + tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()


#: Strategies of training/parallel.py.
ANY_PARALLEL = frozenset({"ddp", "fsdp"})


#: Before the names of `shared` in a checkpoint; `RESERVED`: before those of hooks and of privacy, which lie there too.
SHARED = "shared/"
RESERVED = ("hooks/", "privacy/")


@dataclass(frozen=True)
class Properties:
    """What an algorithm declares of itself; the contract suite tests each.

    Attributes:
        linear_sum: the server only needs Σ w_k x_k; may be privatised, streams.
        order_independent: the result does not depend on the order in which clients are listed.
        exact: aggregation equals the mean of what clients learned, not an approximation.
        personal: each client ends with a model of its own; those are evaluated and saved.
        pooled: a baseline that trains on all clients' data in one place (simulator only).
        mixed_ranks: clients may have ranks of their own (adapter.ranks).
        asynchronous: clients are not waited for: `buffer` updates make a round, some from older versions of the model.
        streams: aggregation folds one update at a time; otherwise it holds all of a round in memory.
        methods: the PEFT methods it takes; None takes all.
        neutral: options under which one client's run equals plain local training.
        offsite: clients hold an emulator of the model and not the model; they measure that, the server measures the
            result in the full model.
        cohorts: clients may train several in one pass (train.cohort): they train by gradients, on the adapter alone, and
            whatever they do to the base, all clients of a round do alike.
        parallel: how several ranks may train one client (training/parallel.py). None: in every way where
        `local_training`
            is the default, in none where it is not. An algorithm that computes losses or gradients of its own declares it
            once it takes `LocalRun.ranks` into account; one that writes into base weights cannot have them sharded.
        weights: it reads, sends or changes weights of the base, which then cannot be quantised.
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
        properties: what is tested of it. `about`: what it says of itself in tables; each class has its own, or none.
        adapter: the recipe's section: method, rank and each client's own rank.
        model: this process's model; there once `server_model` or `client_model` was called.
        shared: the server's copy of what all clients share, on the CPU; there once `server_model` was called.
        kept: what this half remembers between rounds, tensors and JSON (messages/kept.py). The server's is part of every
            checkpoint and comes back on resume. A client's stays with that client and is never sent. Tensors come back on
            the CPU. Whatever else is assigned to `self` is lost when the run is killed.
        client, round: client half: whose turn it is, and in which round.
        evaluating: client half: the live model is about to be measured or saved, not trained. Personal algorithms
            put the client's own weights in then; `receive` may ask.
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
        """How several ranks may train one client: what is declared, and where nothing is, what is sure."""
        if cls.properties.parallel is not None:
            return cls.properties.parallel
        return ANY_PARALLEL if cls.local_training is Algorithm.local_training else frozenset()

    @classmethod
    def check(cls, options: Any, adapter: AdapterConfig, train: TrainConfig, model: ModelConfig) -> None:
        """Refuse a recipe that this algorithm cannot run, as far as its settings tell, before anything is loaded.

        Raises UserError with a sentence that names the setting and the mend. By default everything is taken.
        """

    # ------------------------------------------------------------------ model pre-processing

    def server_model(self, models: Models) -> AdaptedModel:
        """The model that the server evaluates. Sets `model` and `shared`."""
        self.model = models.adapted()
        self.shared = self.model.initial_adapter()
        return self.model

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        """The model that a client trains, made once from its first payload. Sets `model`."""
        self.model = models.adapted()
        return self.model

    # ------------------------------------------------------------------ initial broadcast, re-distribution

    @property
    def own_initial(self) -> bool:
        """Whether a client's first payload is unlike those of rounds, such as an emulator; a restart sends it anew."""
        return type(self).initial_payload is not Algorithm.initial_payload

    def initial_payload(self, client: str) -> Payload:
        """What a client gets first. By default what it gets in every round."""
        return self.round_payload(client)

    def round_payload(self, client: str) -> Payload:
        """What a client gets before it trains or evaluates. By default all that is shared."""
        return Payload(self.shared.tensors())

    # ------------------------------------------------------------------ shared-parameter aggregation

    @abstractmethod
    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        """Fold this round's updates, in client order, into the server's state; returns numbers worth logging.

        `updates` is read once, so that a rule that sums needs memory for one update and not for all.
        Reading it sends the round's later clients their payloads: nothing that `round_payload` reads may change before
        it is exhausted.
        """

    def buffer(self, in_flight: int) -> int:
        """How many updates make a round while `in_flight` clients work. Asked of asynchronous algorithms only."""
        return in_flight

    def update_layout(self) -> Layout | None:
        """Names and shapes that an update must have; None where they differ from client to client."""
        return self.shared.layout

    def accept(self, update: Update) -> None:
        """Refuse an update that must not reach `aggregate`: foreign names or shapes, or numbers that are not finite.

        Raises ValueError with a sentence; the coordinator makes a `Failure` of it.
        """
        layout = self.update_layout()
        if layout is not None:
            check_names(layout, update.payload.tensors)
        floats = {n: t for n, t in update.payload.tensors.items() if t.is_floating_point()}
        whole = one_window(list(floats.values()))
        if whole is not None and all_finite(whole):
            return
        for name, tensor in floats.items():
            if not all_finite(tensor):
                raise ValueError(f"{name} has numbers that are not finite")

    def server_step(self) -> None:
        """Training on the server after aggregation, such as an emulator's alignment. By default nothing."""

    # ------------------------------------------------------------------ the client half

    def receive(self, payload: Payload) -> None:
        """Put the live model into the state that training or evaluation starts from."""
        self.model.adapter.load(payload.tensors)

    def local_training(self, run: LocalRun) -> FitResult:
        """This round's training of the live model. By default optimiser steps on `local_loss`."""
        return run.fit(self)

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor:
        """This batch's contribution to the loss of its optimiser step: a scalar to run backward from.

        Args:
            step_units: supervised tokens, or pairs, in the whole step, all accumulation together. Contributions add
                up to the step's loss, so a penalty on the weights counts `batch.units / step_units` of itself.
        """
        return unit_losses(model, batch).sum() / step_units

    def before_step(self, model: AdaptedModel) -> None:
        """The gradient of the step stands in `model.grad`, not yet clipped: the place to correct it."""

    def after_step(self, model: AdaptedModel) -> None:
        """The optimiser has moved `model.adapter`: the place for a projection or a second model."""

    def shared_state(self) -> Payload:
        """What leaves the client after training. By default the whole adapter."""
        return Payload(self.model.adapter.tensors())

    # ------------------------------------------------------------------ result and state

    def deployed(self, client: str | None = None) -> Deployed:
        """The server's result, or (client half, `client` given) the one that stands in the live model."""
        return Deployed((self.shared if client is None else self.model.adapter).snapshot())

    def server_state(self) -> Payload:
        """Everything that the server needs to carry on after this round: `shared` and `kept`.

        Override it, together with `load_server_state`, only to store less, such as numbers that `shared` follows from.
        Raises ValueError where `kept` cannot be stored.
        """
        check_kept(self.kept, f"self.kept of {type(self).__name__}", reserved=(SHARED, *RESERVED))
        return Payload({**prefixed(self.shared.tensors(), SHARED), **self.kept.tensors}, dict(self.kept.meta))

    def load_server_state(self, state: Payload) -> None:
        """The inverse of `server_state`. Raises ValueError where a tensor of `shared` is missing or has another shape."""
        self.load_shared(state)
        self.kept = Payload(state.without(SHARED), dict(state.meta))

    def load_shared(self, state: Payload) -> None:
        """The part of `load_server_state` that puts `shared` back, for algorithms with a state of their own form."""
        self.shared.load(state.under(SHARED))

    def repeated(self, rounds: int) -> bool:
        """A run was interrupted and goes on from this state; `rounds` rounds after it were finished, and are done again.

        Returns whether that changed the state, which then is written at once.
        """
        return False

    def guarantee(self) -> Mapping[str, Any] | None:
        """What is promised of the privacy of each client so far, as JSON values (docs/run-folder.md); None for nothing."""
        return None

    def left_server(self) -> Mapping[str, int] | None:
        """What a client was given of the model, under `offsite`: parameters and bytes, and those of the full model."""
        return None

    def compared_with(self) -> Mapping[str, Any] | None:
        """The `algorithm` section of an ordinary run that this one wants to stand beside it; None wants none."""
        return None

    def begin(self, client: str, round: int, kept: Payload | None) -> None:
        """It is `client`'s turn in `round` (under evaluation: rounds finished), with what it kept from its last one."""
        self.client = client
        self.round = round
        self.kept = kept or Payload()

    def client_state(self) -> Payload:
        """What stays with the client after training, by default `kept`; never part of a message.

        Raises ValueError where `kept` cannot be stored.
        """
        check_kept(self.kept, f"self.kept of {type(self).__name__}")
        return self.kept
