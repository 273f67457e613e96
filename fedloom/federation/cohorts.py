"""How many clients of a recipe train together: refused where they cannot, timed where the recipe leaves it open.

`check_cohort` goes by the recipe's settings, before anything is loaded; `choose_cohort` tries the model, and under `auto`
the recipe's own batches. What was chosen stands in the recipe that both return. This file does not know how a cohort works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedloom.algorithms.base import Algorithm
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.data.batching import Batch, Plan, collate, round_indices
from fedloom.data.federated import FederatedData
from fedloom.federation.hooks.calls import Hooks
from fedloom.federation.rounds.schedule import Schedule
from fedloom.models.adapters import AdaptedModel
from fedloom.recipe.recipe import Recipe
from fedloom.training.cohort_probe import refusal, speedups

Say = Callable[[str], None]


#: Sizes of a cohort that `auto` times, and how much quicker than clients alone one has to be.
COHORTS, WORTH_IT = (2, 4, 8, 16), 1.05


def check_cohort(recipe: Recipe, algorithm: Algorithm, say: Say) -> Recipe:
    """Refuse a cohort that the recipe's own settings rule out; under auto it is off then, and said to be."""
    adapter, train, properties = recipe.adapter, recipe.train, algorithm.properties
    reasons = {
        f"runtime.name={recipe.runtime.name} has its clients in processes of their own": not getattr(
            registry.runtimes.get(recipe.runtime.name), "takes_cohorts", False
        ),
        f"runtime.ranks={recipe.runtime.ranks} trains each client in several processes": recipe.runtime.ranks > 1,
        f"clients of {recipe.algorithm.name} each need the base for themselves": not properties.cohorts,
        "all data is in one place": properties.pooled,
        f"adapter.method={adapter.method} is not lora": adapter.method != "lora",
        "adapter.dora=true needs each weight's norm for each client": adapter.dora,
        f"adapter.bias={adapter.bias} trains the base, which is everybody's": adapter.bias != "none",
        f"adapter.dropout={adapter.dropout:g} draws masks for one client at a time": adapter.dropout > 0,
        "train.packing=off pads batches": recipe.train.packing == "off",
        f"train.precision={train.precision} is one client's": train.precision != "fp32",
        "train.checkpointing=true computes layers again for one client": train.checkpointing,
        "train.compile=true compiles layers with one client's adapter": train.compile,
        f"train.loss_chunk={train.loss_chunk} makes logits again for one client": train.loss_chunk is not None,
        "train.cache_prefix starts in the middle of the model": train.cache_prefix is not None,
        "hooks look into one client's steps": bool(Hooks.of_client(recipe.hooks)),
    }
    return _without_cohort(recipe, next((why for why, holds in reasons.items() if holds), ""), say)


def _without_cohort(recipe: Recipe, why: str, say: Say) -> Recipe:
    """The recipe as it is without a reason; with one it is refused, or under auto has no cohort."""
    if not why or recipe.train.cohort == "off":
        return recipe
    if recipe.train.cohort != "auto":
        raise UserError(
            f"train.cohort={recipe.train.cohort} cannot be had: {why}; set train.cohort=off (docs/cohort.md)"
        )
    say(f"every client trains alone: {why}")
    return recipe.with_values({"train.cohort": "off"})


def choose_cohort(recipe: Recipe, model: AdaptedModel, data: FederatedData, schedule: Schedule, say: Say) -> Recipe:
    """The recipe with `train.cohort` as off or a number, once model and data are there. Under auto sizes are timed."""
    if recipe.train.cohort == "off":
        return recipe
    why = "this model's batches are padded" if recipe.train.packing == "off" else refusal(model)
    if not why and schedule.sampled() < COHORTS[0]:
        why = f"a round has {schedule.sampled()} client"
    recipe = _without_cohort(recipe, why, say)
    if recipe.train.cohort != "auto":
        return recipe
    say("timing clients that train together")
    batches = _first_batches(recipe, data, schedule.training[: min(COHORTS[-1], schedule.sampled())])
    found = speedups(model, batches, [size for size in COHORTS if size <= len(batches)])
    best = max(found, key=lambda size: found[size])
    chosen = best if found[best] >= WORTH_IT else "off"
    listed = ", ".join(f"{size} clients {ratio:.2f}x" for size, ratio in found.items())
    say(f"together against alone: {listed}; train.cohort={chosen}")
    return recipe.with_values({"train.cohort": chosen})


def _first_batches(recipe: Recipe, data: FederatedData, clients: Sequence[str]) -> list[Batch]:
    """Each client's first forward pass of round 1."""
    plan = Plan(recipe.train.batch_size, steps=1)
    batches = []
    for client in clients:
        own = data.client(client)
        ((indices,),) = round_indices(own.train, plan, 1, recipe.seed, client)
        pairs = [s for i in indices for s in (own.sequences.pair(i) if recipe.train.objective == "dpo" else ())]
        batches.append(collate(pairs or [own.sequences[i] for i in indices], packed=True, pad=0))
    return batches
