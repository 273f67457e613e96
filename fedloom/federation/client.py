"""A client: it takes an assignment and gives back an update, or a failure. It knows no runtime and no other client.

The order of its work is the order of `_train`: its own state from before, the server's payload, local steps, what it
shares, and its own state for later. The recipe comes with the first assignment.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedloom.algorithms.base import Algorithm
from fedloom.algorithms.build import make
from fedloom.common import cache_folder
from fedloom.common.errors import ClientFailed
from fedloom.common.files import folder_name
from fedloom.common.randomness import fork_torch
from fedloom.data.batching import Batch, Plan, round_indices
from fedloom.data.federated import FederatedData
from fedloom.data.prompts import Template
from fedloom.evaluation.loss import loss_sums
from fedloom.evaluation.score import score
from fedloom.evaluation.suites import Suite
from fedloom.federation.hooks.base import Fit
from fedloom.federation.hooks.calls import SECTION, Hooks
from fedloom.federation.record.checkpoints import Store
from fedloom.messages.at_rest import DamagedFile
from fedloom.messages.operators.channel import Chains, ClientChannel
from fedloom.messages.types import UNEXPECTED_CODING, Assignment, Cost, Failure, Outcome, Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.prefix_cache import MEGABYTE, PrefixCache
from fedloom.recipe.recipe import Recipe
from fedloom.training.compiling import trouble
from fedloom.training.objectives import OBJECTIVES
from fedloom.training.parallel import ALONE, Ranks, bystander, deal
from fedloom.training.probes import settle_attention
from fedloom.training.trainer import FitResult, LocalRun

#: The section of a client's stored state with what its algorithm keeps. The name is part of the file format.
KEPT = "personal"


def held_seconds(device: torch.device | None, ranks: int, wall: float) -> float:
    """How long work of `wall` seconds held GPUs, one for each rank; 0 elsewhere. It ends when its result is on the CPU."""
    return wall * ranks if device is not None and device.type == "cuda" else 0.0


class Client:
    """Serves any number of clients, one at a time, from one model.

    Args:
        models: builds models from the base model in this process.
        data: this site's data, or all clients' data in a simulation.
        template: the prompt template.
        store: stores a client's own state.
        results: the folder that `save` writes personal adapters under.
        suite: the paired evaluation, or None.
        ranks: this process's rank among those that train each client together. All do the same work; only the first
            returns the client's outcome and writes files.
        cache: the folder for what can be computed again; None uses fedloom's own.
    """

    def __init__(
        self,
        models: Models,
        data: FederatedData,
        template: Template,
        store: Store,
        results: Path,
        suite: Suite | None = None,
        ranks: Ranks = ALONE,
        cache: Path | None = None,
    ) -> None:
        self._models = models
        self._data = data
        self._template = template
        self._store = store
        self._results = results
        self._suite = suite
        self._ranks = ranks
        self._cache = cache
        self._recipe: Recipe
        self._algorithm: Algorithm
        self._channel: ClientChannel | None
        self._hooks: Hooks | None
        self._model: AdaptedModel | None = None
        self._configured: Mapping[str, Any] | None = None

    def handle(self, assignment: Assignment) -> Outcome:
        """Do one piece of work. A failure of the work is a value; a programming error propagates."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            if assignment.recipe is not None:
                self._configure(assignment.recipe)
            work = {"train": self._train, "evaluate": self._evaluate, "save": self._save}[assignment.kind]
            self._prepare(assignment)
            outcome: Outcome = work(assignment)
        except ClientFailed as failure:
            outcome = Failure(assignment.client, assignment.round, failure.reason, failure.detail)
        except DamagedFile as damage:
            outcome = Failure(assignment.client, assignment.round, "damaged_state", str(damage))
        except torch.OutOfMemoryError:
            if self._ranks.count > 1:  # the others wait for this one in the middle of a step: all have to start again
                raise
            outcome = Failure(
                assignment.client, assignment.round, "out_of_memory", "out of memory: lower train.batch_size"
            )
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        held = held_seconds(self._model.device if self._model is not None else None, self._ranks.count, wall)
        spent = Cost(wall_seconds=wall, cpu_seconds=cpu, gpu_seconds=held)
        return replace(outcome, cost=outcome.cost + spent)

    def beside(self, recipe: Mapping[str, Any], live: AdaptedModel) -> Client:
        """A second client on the same data and store, under `recipe`, with a live model of its own on the same base."""
        self._configure(recipe)
        other = copy.copy(self)
        other._models, other._model = self._models.with_adapted(live), None
        other._algorithm = make(self._recipe)
        other._channel = self._channel and ClientChannel(self._channel.chains, self._recipe.seed)
        return other

    @property
    def live(self) -> AdaptedModel:
        """The base with the adapter that this client trains."""
        return self._models.adapted()

    def close(self) -> None:
        """Let go of the model, which the algorithm's client half holds too."""
        self._model = None
        if self._configured is not None:
            self._configured = None
            del self._algorithm

    def _configure(self, values: Mapping[str, Any]) -> None:
        if values == self._configured:
            return
        self._configured = values
        self._recipe = Recipe.parse(values)
        self._algorithm = make(self._recipe)
        chains = Chains.of(self._recipe.operators, self._recipe.privacy is not None)
        self._channel = ClientChannel(chains, self._recipe.seed) if chains else None
        self._hooks = Hooks.of_client(self._recipe.hooks) or None
        self._objective = OBJECTIVES[self._recipe.train.objective](self._recipe.train)

    def _prepare(self, assignment: Assignment) -> None:
        """Model and state, as they were after the rounds before this one."""
        payload = self._received(assignment)
        if self._model is None:
            self._model = self._algorithm.client_model(self._models, payload)
            self._model.prefix = None
            if self._recipe.train.packing == "on":  # a site's own kernel has not been tried yet
                train, wanted = self._recipe.train, self._recipe.model.attention
                settle_attention(wanted, self._model, train.precision)
            if (megabytes := self._recipe.train.cache_prefix) is not None:
                folder = (self._cache or cache_folder.cache_home()) / "prefix"
                self._model.prefix = PrefixCache(self._model, folder, megabytes * MEGABYTE)
        if self._recipe.train.compile and assignment.kind == "train":
            why = trouble(self._model, self._recipe.train, self._recipe.train.packing == "on")
            if why:
                raise ClientFailed("not_compiled", f"train.compile=true cannot be used here: {why}")
        up_to = assignment.round - 1 if assignment.kind == "train" else assignment.round
        self._state = self._store.load(assignment.client, up_to)
        self._algorithm.evaluating = assignment.kind != "train"
        self._algorithm.begin(assignment.client, assignment.round, self._state.get(KEPT))
        if self._channel is not None:
            self._channel.resume(self._state.get("operators"))
        self._algorithm.receive(payload)

    def _received(self, assignment: Assignment) -> Payload:
        """The plain payload of an assignment."""
        if self._channel is not None:
            return self._channel.decode(assignment)
        if assignment.payload.coding is not None:
            raise ClientFailed("bad_payload", UNEXPECTED_CODING)
        return assignment.payload

    def _train(self, assignment: Assignment) -> Update:
        client, round = assignment.client, assignment.round
        train, sequences = self._data.partition.shards[client].train, self._data.sequences
        if not train:
            raise ClientFailed("no_data", "this client has no training examples")
        result, others = self._trained(assignment, train)
        if not result.steps:
            raise ClientFailed("non_finite", f"all {result.skipped_steps} steps of this round were skipped")
        shared = self._algorithm.shared_state()
        if self._ranks.rank > 0:
            return Update(client, round, Payload())
        payload, left = shared, Payload()
        if self._channel is not None:
            payload = self._channel.encode(shared, client, round)
            left = self._channel.state()
        kept = Payload(result.optimizer_state) if self._recipe.train.optimizer_state == "keep" else Payload()
        own = {KEPT: self._algorithm.client_state(), "optimizer": kept, "operators": left}
        if self._hooks is not None:
            own[SECTION] = self._hooks.state()
        numbers = {} if self._hooks is None else self._hooks.numbers()
        self._store.save(client, round, own)
        return Update(
            client,
            round,
            payload,
            num_examples=len(train),
            num_tokens=sequences.supervised_tokens(train),
            metrics={"loss": result.loss, "skipped_steps": result.skipped_steps, **numbers},
            cost=Cost(train_tokens=result.tokens, train_flops=result.flops, steps=result.steps, cpu_seconds=others),
        )

    def _trained(self, assignment: Assignment, examples: Sequence[int]) -> tuple[FitResult, float]:
        """This round's training of the live model on `examples`, and the CPU seconds that other ranks spent on it."""
        assert self._model is not None
        train, client, round, ranks = self._recipe.train, assignment.client, assignment.round, self._ranks
        plan = Plan(train.batch_size, train.accumulation, assignment.steps, None if assignment.steps else train.epochs)
        per_round = plan.steps_per_round(len(examples))
        passes = list(round_indices(examples, plan, round, self._recipe.seed, client))
        prepared = self._objective.prepare(
            self._model, self._data.sequences, [i for step in passes for p in step for i in p], train.packing == "on"
        )
        optimizer = self._state.get("optimizer") if train.optimizer_state == "keep" else None
        run = LocalRun(
            self._model,
            partial(self._steps, examples, passes),
            train,
            first_step=(round - 1) * per_round,
            total_steps=assignment.rounds * per_round,
            optimizer_state=optimizer.tensors if optimizer else None,
            hooks=self._hooks,
            ranks=ranks,
        )
        if self._hooks is not None:
            steps_per_epoch = per_round // train.epochs if train.epochs and not assignment.steps else None
            self._hooks.begin(client, round, self._state.get(SECTION), steps_per_epoch)
        began = time.process_time()
        with fork_torch(self._recipe.seed, "dropout", round, client if ranks.count == 1 else ranks.stream(client)):
            result = self._algorithm.local_training(run) if self._hooks is None else self._hooked(run, self._hooks)
        result.flops += prepared
        if ranks.count == 1:
            return result, 0.0
        ranks.check_alike(self._model.adapter.flat)
        spent = time.process_time() - began
        return result, ranks.total(spent) - spent

    def _hooked(self, run: LocalRun, hooks: Hooks) -> FitResult:
        """Local training between the hooks' first point and their last."""
        fit = Fit(run.model, run.config)
        hooks.call("fit_start", fit)
        fit.result = self._algorithm.local_training(run)
        hooks.call("fit_end", fit)
        return fit.result

    def _steps(self, train: Sequence[int], steps: list[list[list[int]]]) -> Iterator[list[Batch]]:
        """Each step's passes, of all ranks. `train`: the client's training examples."""
        sequences, pad = self._data.sequences, self._template.tokenizer.pad_token_id or 0
        packed = self._recipe.train.packing == "on"
        for passes in steps:
            if self._ranks.count > 1:
                examples = [i for p in passes for i in p]
                hands = deal([len(sequences[i]) for i in examples], self._ranks.count, self._recipe.train.batch_size)
                passes = [[examples[at] for at in hand] for hand in hands]
            yield [
                self._objective.batch(sequences, indices, packed=packed, pad=pad)
                if indices
                else bystander(sequences[train[0]], packed=packed, pad=pad)
                for indices in passes
            ]

    def _evaluate(self, assignment: Assignment) -> Update:
        assert self._model is not None
        if not (self._ranks.first or self._ranks.sharded):  # with a sharded base all ranks have to go along
            return Update(assignment.client, assignment.round, Payload())
        settings = self._recipe.evaluation
        packed = self._recipe.train.packing == "on"
        pooled = assignment.dataset == "pooled"
        data = self._data.pooled() if pooled else self._data.client(assignment.client)
        indices = data.validation if assignment.dataset == "validation" else data.test
        loss, tokens = loss_sums(self._model, data.sequences, indices, batch_size=settings.batch_size, packed=packed)
        if not math.isfinite(loss):
            raise ClientFailed("non_finite", "the held-out loss of this model is not finite")
        right: list[bool] = []
        if self._suite is not None and assignment.score and data.questions:
            right = score(
                self._model,
                self._template,
                self._suite,
                data.questions,
                batch_size=settings.batch_size,
                max_length=self._recipe.data.max_length,
                max_new_tokens=settings.max_new_tokens,
                packed=packed,
            )
        metrics = {"loss_sum": loss, "tokens": tokens, "right": sum(right), "questions": len(right)}
        metrics |= self._objective.sums(
            self._model, data.sequences, indices, batch_size=settings.batch_size, packed=packed
        )
        return Update(assignment.client, assignment.round, Payload(), metrics=metrics)

    def _save(self, assignment: Assignment) -> Update:
        assert self._model is not None
        if not self._ranks.first:
            return Update(assignment.client, assignment.round, Payload())
        deployed = self._algorithm.deployed(assignment.client)
        folder = self._results / folder_name(assignment.client)
        self._model.save(folder, self._recipe.model.name)
        return Update(assignment.client, assignment.round, Payload(meta={"adapter_sha256": deployed.adapter.sha256()}))
