"""What a recipe leaves open, decided: the algorithm behind its name, the corpus's default split, who trains when, what is
scored. Each returns a value or refuses with a sentence; nothing is run here. What the model itself has to tell: trials.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fedloom import registry
from fedloom.algorithms.base import Algorithm, parse_options
from fedloom.algorithms.making import make, settled
from fedloom.config import Recipe, RuntimeConfig
from fedloom.data.clusters import clustered
from fedloom.data.examples import paired
from fedloom.data.federated import FederatedData
from fedloom.data.prompts import Template
from fedloom.data.sources import load_corpus, resolve_split, source_of
from fedloom.data.splitters import select_questions, select_test_set
from fedloom.data.tokenization import tokenise
from fedloom.errors import UserError, suggest
from fedloom.evaluation.suites import Suite
from fedloom.hooks.base import CLIENT_POINTS
from fedloom.models.loading import pick_device
from fedloom.privacy import PrivacyConfig
from fedloom.randomness import numpy_generator
from fedloom.rounds import Schedule
from fedloom.sections import part_of
from fedloom.types import Corpus, Partition

Say = Callable[[str], None]


def make_algorithm(recipe: Recipe) -> Algorithm:
    """The server's half of the recipe's algorithm. Raises UserError for an unknown name, option or PEFT method."""
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
    return make(recipe)


def check_parallel(recipe: Recipe) -> None:
    """Refuse ranks that could not train this recipe's clients together. Raises UserError."""
    runtime, adapter, name = recipe.runtime, recipe.adapter, recipe.algorithm.name
    if runtime.ranks == 1:
        return
    asked, strategy = f"runtime.ranks={runtime.ranks}", runtime.parallel or "ddp"
    inside = [h.name for h in recipe.hooks if registry.hooks.get(h.name).points(CLIENT_POINTS)]
    if inside:
        raise UserError(
            f"{asked} cannot be had with the hook {inside[0]}, which would see one rank's part of each step: leave one of "
            "them out"
        )
    if recipe.train.cache_prefix:
        raise UserError(f"{asked} cannot be had with train.cache_prefix, which is one process's: leave one of them out")
    if strategy == "fsdp" and recipe.train.compile:
        raise UserError(
            "train.compile=true cannot be had with runtime.parallel=fsdp, which puts a layer's weights in place as it is "
            "called: leave it out, or use runtime.parallel=ddp"
        )
    spared = "checkpointing=true" if recipe.train.checkpointing else f"loss_chunk={recipe.train.loss_chunk}"
    if strategy == "fsdp" and (recipe.train.checkpointing or recipe.train.loss_chunk):
        raise UserError(
            f"train.{spared} cannot be had with runtime.parallel=fsdp, whose shards would be gathered again: leave it out, "
            "or use runtime.parallel=ddp"
        )
    if strategy == "fsdp" and recipe.model.quantization:
        raise UserError(
            f"model.quantization={recipe.model.quantization} cannot be had with runtime.parallel=fsdp, which shards plain "
            "weights: use runtime.parallel=ddp"
        )
    cls = registry.algorithms.get(name)
    if not getattr(registry.runtimes.get(runtime.name), "takes_ranks", False):
        raise UserError(f"{asked} cannot be had with runtime.name={runtime.name}, whose clients are single processes")
    if cls.properties.offsite:
        raise UserError(
            f"{asked} cannot be had with {name}: its clients are sent an emulator once, which a cluster that was started "
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


def check_runtime(recipe: Recipe, algorithm: Algorithm) -> None:
    """Refuse a runtime that is not there, or that an algorithm's clients cannot work in, or that this machine cannot be."""
    runtime = registry.runtimes.get(recipe.runtime.name)
    if algorithm.properties.offsite and not getattr(runtime, "offsite", True):
        raise UserError(
            f"algorithm {recipe.algorithm.name} sends an emulator once, which a client's process has to keep, and "
            f"runtime.name={recipe.runtime.name} moves clients between processes: use runtime.name=simulator"
        )
    check_devices(recipe.runtime)


def _taking_mixed_ranks() -> list[str]:
    return [n for n in registry.algorithms.names() if registry.algorithms.get(n).properties.mixed_ranks] or ["none yet"]


def load_data(recipe: Recipe, say: Say) -> tuple[Corpus, Recipe]:
    """The corpus, and the recipe with the split's open fields filled in from the corpus's default."""
    split = resolve_split(recipe.split, source_of(recipe.data))
    recipe = recipe.with_values({f"split.{key}": value for key, value in split.model_dump(mode="json").items()})
    say(f"loading {recipe.data.corpus or recipe.data.path}")
    corpus = load_corpus(recipe.data, by=split.by, seed=recipe.seed, say=say, splitter=split.splitter)
    if split.clusters is not None:
        say(f"grouping {len(corpus.examples):,} texts by their words")
        corpus = clustered(corpus, split.clusters, recipe.seed)
    return for_objective(corpus, recipe.train.objective, say), recipe


def for_objective(corpus: Corpus, objective: str, say: Say) -> Corpus:
    """Under `dpo` the examples that are pairs, the others left out and counted; under `sft` all, without rejected answers.

    Raises UserError where preferences are to be learned from data that have none.
    """
    if objective != "dpo":
        return replace(corpus, examples=tuple(replace(e, rejected="") for e in corpus.examples))
    pairs, left_out = paired(corpus.examples)
    if not pairs:
        raise UserError(
            f"train.objective=dpo needs a rejected answer beside each answer, and {corpus.name} has none: use "
            "data.corpus=fed-preferences, or name the column that holds them with data.columns.rejected=NAME"
        )
    for reason, count in left_out.items():
        say(f"{corpus.name}: {count:,} rows left out ({reason.replace('_', ' ')})")
    return replace(corpus, examples=tuple(pairs), dropped={**corpus.dropped, **left_out})


def check_ranks(recipe: Recipe, clients: Partition) -> None:
    """Refuse a rank of its own for a client that there is not: it would silently have everybody's."""
    assert not isinstance(recipe.adapter.ranks, str), "settled by settle_fleet"
    for client in recipe.adapter.ranks or {}:
        if client not in clients.clients:
            raise UserError(f"adapter.ranks names {client}, which is no client: {suggest(client, clients.clients)}")


def measured_clients(recipe: Recipe, clients: Partition) -> tuple[str, ...]:
    """Those that hold test data, or as many of them as evaluation.clients says, in order: the same ones every time."""
    testing = clients.testing_clients
    wanted = recipe.evaluation.clients
    count = part_of(wanted, len(testing))
    if count > len(testing):
        raise UserError(
            f"evaluation.clients={wanted} but only {len(testing)} clients hold test data: ask for fewer, or null for all"
        )
    if count == len(testing):
        return testing
    chosen = numpy_generator(recipe.seed, "measured").choice(len(testing), count, replace=False)
    return tuple(testing[i] for i in sorted(chosen))


def make_schedule(recipe: Recipe, algorithm: Algorithm, clients: Partition) -> Schedule:
    """Who trains when, and who is measured. Under a pooled baseline one client takes everybody's steps."""
    federation = recipe.federation
    training = clients.training_clients
    schedule = Schedule(
        training, clients.testing_clients, federation, recipe.train.steps, recipe.evaluation.every, recipe.seed,
        measured=measured_clients(recipe, clients),
    )  # fmt: skip
    if schedule.sampled() > len(training):
        raise UserError(
            f"federation.clients_per_round={federation.clients_per_round} but only {len(training)} clients hold training "
            "data: ask for fewer, or split among more (split.num_clients)"
        )
    counted, unit = schedule.sampled(), "clients"
    if algorithm.properties.asynchronous:
        counted, unit = algorithm.buffer(schedule.sampled()), "updates"
        if counted > schedule.sampled():
            raise UserError(
                f"algorithm.buffer={counted} but only {schedule.sampled()} clients are in flight: lower it, or raise "
                "federation.clients_per_round"
            )
    if federation.min_clients > counted:
        raise UserError(
            f"federation.min_clients={federation.min_clients} but a round has {counted} {unit}: "
            "no round could succeed, lower it"
        )
    if recipe.privacy is not None:
        return _private_schedule(schedule, recipe.privacy)
    if not algorithm.properties.pooled:
        return schedule
    alone = federation.model_copy(update={"clients_per_round": None, "min_clients": 1})
    steps = recipe.train.steps * schedule.sampled() if recipe.train.steps else None
    return replace(schedule, training=clients.pooled().training_clients, federation=alone, steps=steps)


def _private_schedule(schedule: Schedule, privacy: PrivacyConfig) -> Schedule:
    """Sampling as the accountant counts it: independently, where a trusted server hides who was sampled.

    A round without any client is a round, of noise alone: ending the run there would tell who was not in it.
    """
    schedule = replace(schedule, secret=not privacy.seeded)
    if privacy.where == "client" or schedule.sampled() == len(schedule.training):
        return schedule
    federation = schedule.federation
    if federation.min_clients > 1:
        raise UserError(
            f"federation.min_clients={federation.min_clients} cannot be had with privacy and clients_per_round="
            f"{federation.clients_per_round}: each client is sampled independently, so a round may have fewer; leave it out"
        )
    return replace(schedule, independent=True, federation=federation.model_copy(update={"min_clients": 0}))


def settle_privacy(recipe: Recipe, algorithm: Algorithm, schedule: Schedule, say: Say) -> tuple[Recipe, Algorithm]:
    """The recipe with its privacy's numbers filled in, and the algorithm that keeps to them. Both as they are without."""
    if recipe.privacy is None:
        return recipe, algorithm
    recipe = settled(recipe, len(schedule.training))
    privacy = recipe.privacy
    assert privacy is not None
    alike = f"privacy: every client counts the same, whatever its data; changes are clipped to {privacy.clip:g}"
    if not privacy.noise:
        say(f"{alike}, and no noise is added: nothing is promised")
        return recipe, make(recipe)
    target = f", to keep to ε={privacy.epsilon:g}" if privacy.epsilon else ""
    say(
        f"{alike}, and noise of {privacy.noise:g} times the clip is added at the {privacy.where}{target} "
        f"(δ={privacy.delta:g})"
    )
    if privacy.seeded:
        say("privacy: the noise follows from the recipe's seed, so this holds only against those who do not know it")
    return recipe, make(recipe)


def federated_data(
    recipe: Recipe, corpus: Corpus, clients: Partition, template: Template, suite: Suite | None, cache: Path, say: Say
) -> FederatedData:
    """Every client's tokens and questions. A corpus with a test set of its own is asked that, by the server."""
    sequences = tokenise(corpus, template, recipe.data.max_length, cache)
    if sequences.truncated:
        say(
            f"{sequences.truncated} of {len(sequences)} sequences are over {recipe.data.max_length} tokens and lost "
            f"{sequences.truncated_tokens} tokens in all (prompts from their start, answers from their end)"
        )
    limit = recipe.evaluation.limit
    measured = measured_clients(recipe, clients)
    if suite is None:
        return FederatedData(corpus, sequences, clients, {}, measured=measured)
    if corpus.test:
        asked = [corpus.test[i] for i in select_test_set(corpus, limit, recipe.seed)]
        suite.check(asked)
        return FederatedData(corpus, sequences, clients, {}, asked, measured)
    asking = replace(clients, shards={client: clients.shards[client] for client in measured})
    questions = select_questions(corpus, asking, limit, recipe.seed)
    suite.check(corpus.examples[i] for indices in questions.values() for i in indices)
    return FederatedData(corpus, sequences, clients, questions, measured=measured)


def pick_suite(recipe: Recipe, corpus: Corpus) -> tuple[Suite | None, str]:
    """The paired evaluation, or None and why there is none."""
    wanted = recipe.evaluation.suite
    if wanted is None:
        return None, "the recipe asks for no score (evaluation.suite=null)"
    if wanted in registry.task_suites and wanted not in registry.suites:
        raise UserError(
            f"evaluation.suite={wanted} is measured once, after the run: `fedloom evaluate RUN --suite {wanted}`; a run can "
            f"measure {', '.join(registry.suites.names())} every round"
        )
    if wanted != "auto":
        return registry.suites.get(wanted), ""
    if corpus.suite is None:
        return None, source_of(recipe.data).suite_note or f"{corpus.name} has no paired evaluation that runs here"
    return registry.suites.get(corpus.suite), ""
