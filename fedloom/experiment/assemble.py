"""The coordinator of a prepared run, connected to its clients: a runtime of this process, or one that is there already."""

from __future__ import annotations

from typing import Any

from fedloom.common import registry
from fedloom.experiment.prepare import Setting
from fedloom.federation.coordinator import Coordinator
from fedloom.federation.hooks.calls import Hooks, for_clients
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.events import Events, open_trackers
from fedloom.federation.record.run_folder import RunFolder
from fedloom.federation.results import server_measure
from fedloom.federation.runtime import Runtime
from fedloom.federation.watch import Watch
from fedloom.federation.workplace import open_client, open_store
from fedloom.messages.operators.channel import Chains, ServerChannel
from fedloom.runtimes.ranks.pool import Ranked


def assemble(setting: Setting, folder: RunFolder, resume: bool, watch: Watch) -> Coordinator:
    """Connect a runtime with its clients to a coordinator, at the round where the run has to begin or to go on.

    The recipe and the split are written; so are the first events.
    """
    recipe = setting.recipe
    checkpoints = Checkpoints(folder / "checkpoints", recipe.tracking.keep_checkpoints)
    state, damages = checkpoints.newest() if resume else (None, [])
    for damage in damages:
        watch.say(damage)
    folder.write_recipe(recipe)
    folder.write("split.json", setting.split, rows="clients")
    trackers = open_trackers(recipe.tracking.trackers, recipe.name, folder / "trackers", recipe.resolved())
    events = Events(folder / "events.jsonl", watch.event, trackers)
    runtime = setting.runtime or _open_runtime(setting, folder, watch)
    measure = server_measure(
        recipe, setting.model, setting.template, setting.suite, setting.data,
        offsite=setting.algorithm.properties.offsite,
    )  # fmt: skip
    coordinator = Coordinator(
        setting.algorithm,
        runtime,
        setting.schedule,
        checkpoints,
        events,
        for_clients(recipe),
        channel=ServerChannel(Chains.of(recipe.operators, recipe.privacy is not None), recipe.seed),
        score=setting.suite is not None,
        server_measure=None if setting.runtime else measure,
        tick=watch.tick,
        pace=setting.pace,
        hooks=Hooks.of_server(recipe.hooks),
        validating=[c for c, shard in setting.data.partition.shards.items() if shard.validation],
    )
    if state is None:
        events.write("run_started", **_headline(setting))
    else:
        coordinator.resume(state, lost=max(checkpoints.rounds()) - state.round)
        events.write("run_resumed", round=state.round, rounds=recipe.federation.rounds, note="; ".join(damages))
    return coordinator


def _open_runtime(setting: Setting, folder: RunFolder, watch: Watch) -> Runtime:
    """The runtime that the recipe names, with its clients."""
    recipe, name = setting.recipe, setting.recipe.runtime.name
    if name in registry.openers:
        opened: Runtime = registry.openers.get(name)(recipe, setting.data, folder.path, watch.say)
        return opened
    if recipe.runtime.ranks > 1:
        client: Any = Ranked(recipe, folder.path)
    else:
        client = open_client(
            recipe, setting.models, setting.data, setting.template, open_store(recipe, folder.path), folder / "adapters"
        )
    runtime: Runtime = registry.runtimes.get(name)(client, setting.data.partition.clients)
    return runtime


def _headline(setting: Setting) -> dict[str, Any]:
    recipe = setting.recipe
    return {
        "name": recipe.name,
        "algorithm": recipe.algorithm.name,
        "model": recipe.model.name,
        "corpus": setting.corpus.name,
        "clients": len(setting.clients.clients),
        "rounds": recipe.federation.rounds,
        "parameters": setting.model.adapter.layout.numel,
    }
