"""Connect the coordinator of a prepared run to its clients, in a new runtime or in one that is already open."""

from __future__ import annotations

import logging
from typing import Any

from fedloom.common import registry
from fedloom.experiment.prepare import Setting
from fedloom.federation.client import Client
from fedloom.federation.coordinator import Coordinator, Record
from fedloom.federation.evaluator import Evaluator
from fedloom.federation.hooks.calls import Hooks, for_clients
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.client_table import ClientTable
from fedloom.federation.record.events import Events, open_trackers
from fedloom.federation.record.run_folder import RunFolder
from fedloom.federation.results import server_measure
from fedloom.federation.rounds.asynchronous import AsynchronousRounds
from fedloom.federation.rounds.collection import UpdateSource
from fedloom.federation.rounds.devices import make_fleet, pace_of
from fedloom.federation.rounds.dispatcher import Dispatcher, Terms
from fedloom.federation.rounds.synchronous import SynchronousRounds
from fedloom.federation.rounds.virtual_time import VirtualTime
from fedloom.federation.runtime import Runtime
from fedloom.federation.watch import Watch
from fedloom.federation.workplace import open_client, open_store
from fedloom.messages.operators.channel import Chains, ServerChannel

log = logging.getLogger(__name__)


def assemble(setting: Setting, folder: RunFolder, resume: bool, watch: Watch) -> Coordinator:
    """Connect a runtime with its clients to a coordinator, at the round where the run begins or resumes.

    Writes the recipe, the split and the first events into the run's folder.
    """
    recipe = setting.recipe
    checkpoints = Checkpoints(folder / "checkpoints", recipe.tracking.keep_checkpoints)
    state, damages = checkpoints.newest() if resume else (None, [])
    for damage in damages:
        log.warning(damage)
    folder.write_recipe(recipe)
    folder.write("split.json", setting.found.split, rows="clients")
    trackers = open_trackers(recipe.tracking.trackers, recipe.name, folder / "trackers", recipe.resolved())
    events = Events(folder / "events.jsonl", watch.event, trackers)
    runtime = setting.runtime or _open_runtime(setting, folder, watch)
    coordinator = _coordinator(setting, runtime, Record(checkpoints, events), watch)
    if state is None:
        events.write("run_started", **_headline(setting))
    else:
        coordinator.resume(state, lost=max(checkpoints.rounds()) - state.round)
        events.write("run_resumed", round=state.round, rounds=recipe.federation.rounds, note="; ".join(damages))
    return coordinator


def _open_runtime(setting: Setting, folder: RunFolder, watch: Watch) -> Runtime:
    """Open the runtime that the recipe names, with its clients."""
    recipe, data = setting.recipe, setting.data

    def client() -> Client:
        store = open_store(recipe, folder.path)
        return open_client(recipe, setting.models, data, setting.template, store, folder / "adapters")

    named: type[Runtime] = registry.runtimes.get(recipe.runtime.name)
    return named.open(recipe, data, folder.path, client)


def _coordinator(setting: Setting, runtime: Runtime, record: Record, watch: Watch) -> Coordinator:
    """Build the coordinator from its parts, before the first round."""
    recipe, algorithm, schedule = setting.recipe, setting.algorithm, setting.schedule
    folder, hooks = record.checkpoints.folder, Hooks.of_server(recipe.hooks)
    pace = pace_of(recipe, algorithm, make_fleet(recipe, setting.found.clients))
    virtual = VirtualTime(pace) if pace is not None and runtime.capabilities.virtual else None
    chains = Chains.of(recipe.operators, recipe.privacy is not None)
    channel = ServerChannel(chains, recipe.seed) if chains else None
    terms = Terms(for_clients(recipe), recipe.federation.rounds, schedule.steps, score=setting.found.suite is not None)
    dispatcher = Dispatcher(algorithm, runtime, terms, channel, record.events, watch.tick, virtual)
    source: UpdateSource = SynchronousRounds(dispatcher, schedule, folder)
    if algorithm.properties.asynchronous:
        buffer = algorithm.buffer(schedule.sampled())
        source = AsynchronousRounds(dispatcher, schedule, buffer, folder / "in-flight")
    offsite = algorithm.properties.offsite
    measure = server_measure(
        recipe, setting.model, setting.template, setting.found.suite, setting.data, offsite=offsite
    )
    evaluator = Evaluator(
        algorithm,
        dispatcher,
        schedule,
        ClientTable(record.events.path.parent / "evaluations"),
        hooks=hooks,
        server_measure=None if setting.runtime else measure,
        validating=[c for c, shard in setting.data.partition.shards.items() if shard.validation],
    )
    return Coordinator(algorithm, dispatcher, source, evaluator, record, hooks)


def _headline(setting: Setting) -> dict[str, Any]:
    recipe = setting.recipe
    return {
        "name": recipe.name,
        "algorithm": recipe.algorithm.name,
        "model": recipe.model.name,
        "corpus": setting.found.corpus.name,
        "clients": len(setting.found.clients.clients),
        "rounds": recipe.federation.rounds,
        "parameters": setting.model.adapter.layout.numel,
    }
