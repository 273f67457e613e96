"""What an algorithm cannot work with, by what it declares of itself and the recipe's other settings."""

from __future__ import annotations

from fedloom.algorithms.build import can_be_private, not_private
from fedloom.common import registry
from fedloom.federation.checks.facts import RecipeFacts
from fedloom.federation.checks.rule import Rule
from fedloom.federation.hooks.base import CLIENT_POINTS


def _mixed_ranks() -> str:
    able = [n for n in registry.algorithms.names() if registry.algorithms.get(n).properties.mixed_ranks]
    return ", ".join(able) or "none yet"


def _two_factors(f: RecipeFacts) -> str:
    """The option of LoRA that an algorithm for its two factors does not take."""
    methods, adapter = f.properties.methods, f.recipe.adapter
    if methods is None or "lora" not in methods:
        return ""
    if adapter.dora:
        return "dora=true"
    return f"bias={adapter.bias}" if adapter.bias != "none" else ""


#: The recipe's method, model and privacy.
ALGORITHM_RULES = (
    Rule[RecipeFacts](
        "algorithm.method",
        "an `adapter.method` that the algorithm does not take",
        lambda f: f.properties.methods is not None and f.recipe.adapter.method not in f.properties.methods,
        lambda f, _: (
            f"algorithm {f.recipe.algorithm.name} does not take adapter.method={f.recipe.adapter.method}: it takes "
            f"{', '.join(sorted(f.properties.methods or ()))}"
        ),
    ),
    Rule[RecipeFacts](
        "algorithm.two_factors",
        "`adapter.dora` or `adapter.bias` with an algorithm that works on LoRA's two factors alone",
        _two_factors,
        lambda f, option: (
            f"algorithm {f.recipe.algorithm.name} works on LoRA's two factors alone, so it does not take adapter.{option}: "
            "leave it out, or use an algorithm that takes every PEFT method, such as fedavg"
        ),
    ),
    Rule[RecipeFacts](
        "algorithm.mixed_ranks",
        "`adapter.ranks` with an algorithm that needs one rank for all clients",
        lambda f: f.recipe.adapter.ranks and not f.properties.mixed_ranks,
        lambda f, _: (
            f"adapter.ranks is set but algorithm {f.recipe.algorithm.name} needs one rank for all clients: leave it out, or "
            f"use an algorithm that takes mixed ranks ({_mixed_ranks()})"
        ),
    ),
    Rule[RecipeFacts](
        "algorithm.dpo",
        "`train.objective: dpo` with an algorithm whose clients have no base model",
        lambda f: f.properties.offsite and f.recipe.train.objective == "dpo",
        lambda f, _: (
            f"train.objective=dpo compares with the base model, which clients of {f.recipe.algorithm.name} do not have: use "
            "train.objective=sft, or an algorithm whose clients have it, such as fedavg_outer"
        ),
    ),
    Rule[RecipeFacts](
        "algorithm.quantization",
        "`model.quantization` with an algorithm that works on weights of the base",
        lambda f: f.properties.weights and f.recipe.model.quantization,
        lambda f, kind: (
            f"algorithm {f.recipe.algorithm.name} works on weights of the base, which model.quantization={kind} keeps in a "
            "few bits: set model.quantization=null, or use an algorithm that leaves the base as it is, such as fedavg"
        ),
    ),
    Rule[RecipeFacts](
        "algorithm.compile",
        "`train.compile` with an algorithm that changes weights of the base",
        lambda f: f.properties.weights and f.recipe.train.compile,
        lambda f, _: (
            f"algorithm {f.recipe.algorithm.name} changes weights of the base, which compiled code does not notice: set "
            "train.compile=false, or use an algorithm that leaves the base as it is, such as fedavg"
        ),
    ),
    Rule[RecipeFacts](
        "algorithm.privacy",
        "`privacy` with an algorithm that is no plain sum over clients",
        lambda f: f.recipe.privacy is not None and not can_be_private(f.recipe.algorithm.name),
        lambda f, _: not_private(f.recipe.algorithm.name),
    ),
)


def _inside(f: RecipeFacts) -> str:
    """The first hook that acts within a client's round."""
    return next((name for name, hook in f.hooks.items() if hook.points(CLIENT_POINTS)), "") if f.strategy else ""


def _recomputed(f: RecipeFacts) -> str:
    """The setting that has a layer computed again."""
    train = f.recipe.train
    if f.strategy != "fsdp":
        return ""
    if train.checkpointing:
        return "checkpointing=true"
    return f"loss_chunk={train.loss_chunk}" if train.loss_chunk else ""


def _asked(f: RecipeFacts) -> str:
    return f"runtime.ranks={f.recipe.runtime.ranks}"


#: Several processes that train one client.
RANK_RULES = (
    Rule[RecipeFacts](
        "ranks.runtime",
        "`runtime.ranks` in a runtime whose clients are single processes",
        lambda f: f.strategy and not f.can.ranks,
        lambda f, _: (
            f"{_asked(f)} cannot be used with runtime.name={f.recipe.runtime.name}, whose clients are single processes: "
            "leave runtime.ranks out, or use runtime.name=simulator"
        ),
    ),
    Rule[RecipeFacts](
        "ranks.offsite",
        "`runtime.ranks` with an algorithm that sends an emulator once",
        lambda f: f.strategy and f.properties.offsite,
        lambda f, _: (
            f"{_asked(f)} cannot be used with {f.recipe.algorithm.name}: its clients are sent an emulator once, which "
            "processes that were started again would not have; leave runtime.ranks out"
        ),
    ),
    Rule[RecipeFacts](
        "ranks.own_loop",
        "`runtime.ranks` with an algorithm whose training loop does not say how ranks share it",
        lambda f: f.strategy and not f.properties.offsite and not f.algorithm.strategies(),
        lambda f, _: (
            f"algorithm {f.recipe.algorithm.name} has a training loop of its own that does not say how ranks share it, so "
            f"{_asked(f)} cannot be used with it: leave runtime.ranks out, or use another algorithm, such as fedavg"
        ),
    ),
    Rule[RecipeFacts](
        "ranks.hooks",
        "`runtime.ranks` with a hook that acts within a client's round",
        _inside,
        lambda f, hook: (
            f"{_asked(f)} cannot be used with the hook {hook}, which would see one rank's part of each step: leave one of "
            "them out"
        ),
    ),
    Rule[RecipeFacts](
        "ranks.cache_prefix",
        "`runtime.ranks` with `train.cache_prefix`",
        lambda f: f.strategy and f.recipe.train.cache_prefix is not None,
        lambda f, _: (
            f"{_asked(f)} cannot be used with train.cache_prefix={f.recipe.train.cache_prefix}, which is for one process: "
            "leave one of them out"
        ),
    ),
    Rule[RecipeFacts](
        "fsdp.weights",
        "`runtime.parallel: fsdp` with an algorithm that adds to base weights",
        lambda f: f.strategy and f.algorithm.strategies() and f.strategy not in f.algorithm.strategies(),
        lambda f, _: (
            f"algorithm {f.recipe.algorithm.name} adds to base weights, which runtime.parallel={f.strategy} would shard: "
            f"use runtime.parallel={' or '.join(sorted(f.algorithm.strategies()))}"
        ),
    ),
    Rule[RecipeFacts](
        "fsdp.trains_base",
        "`runtime.parallel: fsdp` with an adapter that trains weights of the base",
        lambda f: f.strategy == "fsdp" and f.recipe.adapter.trains_base,
        lambda f, what: (
            f"runtime.parallel=fsdp shards a frozen base, but adapter.{what} trains weights of it, which lie in one buffer: "
            "use runtime.parallel=ddp"
        ),
    ),
    Rule[RecipeFacts](
        "fsdp.compile",
        "`runtime.parallel: fsdp` with `train.compile`",
        lambda f: f.strategy == "fsdp" and f.recipe.train.compile,
        lambda f, _: (
            "train.compile=true cannot be used with runtime.parallel=fsdp, which puts a layer's weights in place as it is "
            "called: leave it out, or use runtime.parallel=ddp"
        ),
    ),
    Rule[RecipeFacts](
        "fsdp.recomputed",
        "`runtime.parallel: fsdp` with `train.checkpointing` or `train.loss_chunk`",
        _recomputed,
        lambda f, what: (
            f"train.{what} cannot be used with runtime.parallel=fsdp, which would collect the weights of a layer twice: "
            "leave it out, or use runtime.parallel=ddp"
        ),
    ),
    Rule[RecipeFacts](
        "fsdp.quantization",
        "`runtime.parallel: fsdp` with `model.quantization`",
        lambda f: f.strategy == "fsdp" and f.recipe.model.quantization,
        lambda f, kind: (
            f"model.quantization={kind} cannot be used with runtime.parallel=fsdp, which shards plain weights: use "
            "runtime.parallel=ddp"
        ),
    ),
)
