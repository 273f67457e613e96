"""Refuse what cannot be, as far as the recipe alone tells: before data or model are touched, wherever the clients are.

`check_recipe` is called by every run in the same place: by the simulator, and by the server of sites before it starts
anything. What the data tell is checked as the recipe is settled (experiment/prepare.py), what the model tells after it is
loaded (training/probes.py). Nothing is run here.
"""

from __future__ import annotations

import torch

from fedloom.algorithms.base import parse_options
from fedloom.algorithms.build import check_private
from fedloom.common import registry
from fedloom.common.errors import UserError, suggest
from fedloom.data.corpus import Partition
from fedloom.evaluation.pick_suite import check_suite
from fedloom.federation.cohorts import alone_by_recipe, check_cohort
from fedloom.federation.hooks.base import CLIENT_POINTS
from fedloom.federation.hooks.calls import check_private_hooks
from fedloom.federation.record.events import find_trackers
from fedloom.federation.rounds.devices import check_simulated_devices
from fedloom.messages.operators.channel import Chains
from fedloom.models.loading import pick_device
from fedloom.recipe.recipe import Recipe, RuntimeConfig


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for a recipe that no data and no model could make run."""
    find_trackers(recipe.tracking.trackers)
    check_algorithm(recipe)
    check_runtime(recipe)
    check_devices(recipe.runtime)
    check_simulated_devices(recipe)
    Chains.of(recipe.operators, recipe.privacy is not None)
    check_private_hooks(recipe)
    check_suite(recipe.evaluation.suite)
    if recipe.data.corpus is not None:
        registry.corpora.get(recipe.data.corpus)
    if recipe.split.splitter is not None:
        registry.splitters.get(recipe.split.splitter)
    check_cohort(recipe.train.cohort, alone_by_recipe(recipe))


def check_algorithm(recipe: Recipe) -> None:
    """Raise UserError for an unknown algorithm, option or PEFT method, or settings that the algorithm cannot work with."""
    name = recipe.algorithm.name
    cls = registry.algorithms.get(name)
    methods = cls.properties.methods
    if methods is not None and recipe.adapter.method not in methods:
        raise UserError(
            f"algorithm {name} does not take adapter.method={recipe.adapter.method}: it takes {', '.join(sorted(methods))}"
        )
    if methods is not None and "lora" in methods and (recipe.adapter.dora or recipe.adapter.bias != "none"):
        option = "dora=true" if recipe.adapter.dora else f"bias={recipe.adapter.bias}"
        raise UserError(
            f"algorithm {name} works on LoRA's two factors alone, so it does not take adapter.{option}: leave it out, or "
            "use an algorithm that takes every PEFT method, such as fedavg"
        )
    if recipe.adapter.ranks and not cls.properties.mixed_ranks:
        raise UserError(
            f"adapter.ranks is set but algorithm {name} needs one rank for all clients: leave it out, or use "
            f"an algorithm that takes mixed ranks ({', '.join(_taking_mixed_ranks())})"
        )
    if cls.properties.offsite and recipe.train.objective == "dpo":
        raise UserError(
            f"train.objective=dpo compares with the base model, which clients of {name} do not hold: use "
            "train.objective=sft, or an algorithm whose clients do, such as fedavg_outer"
        )
    if cls.properties.weights and recipe.model.quantization:
        raise UserError(
            f"algorithm {name} works on weights of the base, which model.quantization={recipe.model.quantization} keeps in "
            "a few bits: set model.quantization=null, or use an algorithm that leaves the base as it is, such as fedavg"
        )
    if recipe.train.compile and cls.properties.weights:
        raise UserError(
            f"algorithm {name} changes the base under its layers, and code that was compiled of them would not hear of it: "
            "set train.compile=false, or use an algorithm that leaves the base as it is, such as fedavg"
        )
    check_parallel(recipe)
    options = parse_options(cls, name, recipe.algorithm.options)
    cls.check(options, recipe.adapter, recipe.train, recipe.model)
    if recipe.privacy is not None:
        check_private(name)


def check_parallel(recipe: Recipe) -> None:
    """Refuse ranks that could not train this recipe's clients together. Raises UserError."""
    runtime, adapter, name = recipe.runtime, recipe.adapter, recipe.algorithm.name
    if runtime.ranks == 1:
        return
    asked, strategy = f"runtime.ranks={runtime.ranks}", runtime.parallel or "ddp"
    inside = [h.name for h in recipe.hooks if registry.hooks.get(h.name).points(CLIENT_POINTS)]
    if inside:
        raise UserError(
            f"{asked} cannot be used with the hook {inside[0]}, which would see one rank's part of each step: leave one of "
            "them out"
        )
    if recipe.train.cache_prefix:
        raise UserError(
            f"{asked} cannot be used with train.cache_prefix, which is one process's: leave one of them out"
        )
    if strategy == "fsdp" and recipe.train.compile:
        raise UserError(
            "train.compile=true cannot be used with runtime.parallel=fsdp, which puts a layer's weights in place as it is "
            "called: leave it out, or use runtime.parallel=ddp"
        )
    spared = "checkpointing=true" if recipe.train.checkpointing else f"loss_chunk={recipe.train.loss_chunk}"
    if strategy == "fsdp" and (recipe.train.checkpointing or recipe.train.loss_chunk):
        raise UserError(
            f"train.{spared} cannot be used with runtime.parallel=fsdp, whose shards would be gathered again: leave it out, "
            "or use runtime.parallel=ddp"
        )
    if strategy == "fsdp" and recipe.model.quantization:
        raise UserError(
            f"model.quantization={recipe.model.quantization} cannot be used with runtime.parallel=fsdp, which shards plain "
            "weights: use runtime.parallel=ddp"
        )
    cls = registry.algorithms.get(name)
    if not registry.runtimes.get(runtime.name).capabilities.ranks:
        raise UserError(f"{asked} cannot be used with runtime.name={runtime.name}, whose clients are single processes")
    if cls.properties.offsite:
        raise UserError(
            f"{asked} cannot be used with {name}: its clients are sent an emulator once, which a cluster that was started "
            "again would not have; leave runtime.ranks out"
        )
    able = cls.strategies()
    if not able:
        raise UserError(
            f"algorithm {name} has a training loop of its own that does not say how ranks share it, so {asked} cannot be "
            "had with it: leave runtime.ranks out, or use another algorithm, such as fedavg"
        )
    if strategy not in able:
        raise UserError(
            f"algorithm {name} adds to base weights, which runtime.parallel={strategy} would shard: use "
            f"runtime.parallel={' or '.join(sorted(able))}"
        )
    if strategy == "fsdp" and adapter.trains_base:
        raise UserError(
            f"runtime.parallel=fsdp shards a frozen base, but adapter.{adapter.trains_base} trains weights of it, which lie "
            "in one buffer: use runtime.parallel=ddp"
        )


def check_devices(runtime: RuntimeConfig) -> None:
    """One GPU of this machine for each rank, or none for any. Raises UserError."""
    device = pick_device(runtime.device)
    if runtime.ranks == 1 or not device.startswith("cuda"):
        return
    if device != "cuda":
        raise UserError(
            f"runtime.device={device} is one GPU, but runtime.ranks={runtime.ranks} takes the first {runtime.ranks}: set "
            "runtime.device=cuda, and choose among GPUs with CUDA_VISIBLE_DEVICES"
        )
    if torch.cuda.device_count() < runtime.ranks:
        raise UserError(
            f"runtime.ranks={runtime.ranks} but torch sees {torch.cuda.device_count()} GPUs, and each rank needs one: lower "
            "runtime.ranks, or set runtime.device=cpu"
        )


def check_runtime(recipe: Recipe) -> None:
    """Refuse a runtime that is not there, or that the algorithm's clients cannot work in. Raises UserError."""
    name, runtime = recipe.algorithm.name, registry.runtimes.get(recipe.runtime.name)
    properties = registry.algorithms.get(name).properties
    if properties.offsite and not runtime.capabilities.keeps_clients:
        raise UserError(
            f"algorithm {name} sends an emulator once, which a client's process has to keep, and "
            f"runtime.name={recipe.runtime.name} moves clients between processes: use runtime.name=simulator"
        )
    if properties.pooled and not runtime.capabilities.pooled_tests:
        raise UserError(
            f"algorithm {name} pools all clients' data, which no federation of sites can: run it in the simulator "
            "(runtime.name=simulator)"
        )


def _taking_mixed_ranks() -> list[str]:
    return [n for n in registry.algorithms.names() if registry.algorithms.get(n).properties.mixed_ranks] or ["none yet"]


def check_ranks(recipe: Recipe, clients: Partition) -> None:
    """Refuse a rank of its own for a client that there is not: it would silently have everybody's."""
    assert not isinstance(recipe.adapter.ranks, str), "the devices have settled it"
    for client in recipe.adapter.ranks or {}:
        if client not in clients.clients:
            raise UserError(f"adapter.ranks names {client}, which is no client: {suggest(client, clients.clients)}")
