"""How many clients of a recipe train together: refused where they cannot, timed where the recipe leaves it open.

`alone_by_recipe` goes by the recipe's settings, before anything is loaded; `choose_cohort` tries the model, and under
`auto` the recipe's own batches. This file does not know how a cohort works.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fedloom.common import registry
from fedloom.data.batching import Batch, Plan, collate, round_indices
from fedloom.data.federated import FederatedData
from fedloom.federation.hooks.calls import Hooks
from fedloom.federation.rounds.schedule import Schedule
from fedloom.models.adapters import AdaptedModel
from fedloom.recipe.recipe import Recipe
from fedloom.training.cohort_probe import refusal, speedups

log = logging.getLogger(__name__)


#: Sizes of a cohort that `auto` times, and how much quicker than clients alone one has to be.
COHORTS, WORTH_IT = (2, 4, 8, 16), 1.05


def alone_by_recipe(recipe: Recipe) -> str:
    """Why the recipe's own settings let no clients train together, as half a sentence; empty where they can."""
    adapter, train = recipe.adapter, recipe.train
    properties = registry.algorithms.get(recipe.algorithm.name).properties
    capabilities = registry.runtimes.get(recipe.runtime.name).capabilities
    reasons = {
        f"runtime.name={recipe.runtime.name} has its clients in processes of their own": not capabilities.cohorts,
        f"runtime.ranks={recipe.runtime.ranks} trains each client in several processes": recipe.runtime.ranks > 1,
        f"clients of {recipe.algorithm.name} each need the base for themselves": not properties.cohorts,
        "all data is in one place": properties.pooled,
        f"adapter.method={adapter.method} is not lora": adapter.method != "lora",
        "adapter.dora=true needs each weight's norm for each client": adapter.dora,
        f"adapter.bias={adapter.bias} trains the base, which is everybody's": adapter.bias != "none",
        f"adapter.dropout={adapter.dropout:g} draws masks for one client at a time": adapter.dropout > 0,
        "train.packing=off pads batches": train.packing == "off",
        f"train.precision={train.precision} is one client's": train.precision != "fp32",
        "train.checkpointing=true computes layers again for one client": train.checkpointing,
        "train.compile=true compiles layers with one client's adapter": train.compile,
        f"train.loss_chunk={train.loss_chunk} makes logits again for one client": train.loss_chunk is not None,
        "train.cache_prefix starts in the middle of the model": train.cache_prefix is not None,
        "hooks look into one client's steps": bool(Hooks.of_client(recipe.hooks)),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def choose_cohort(
    recipe: Recipe, packing: str, model: AdaptedModel, data: FederatedData, schedule: Schedule
) -> int | str:
    """Choose `train.cohort`, off or a number, once model and data are there. Under auto sizes are timed.

    Args:
        packing: whether batches are padding-free: on or off.
    """
    if recipe.train.cohort != "auto":
        return recipe.train.cohort
    why = "this model's batches are padded" if packing == "off" else refusal(model)
    if not why and schedule.sampled() < COHORTS[0]:
        why = f"a round has {schedule.sampled()} client"
    if why:
        log.warning(f"every client trains alone: {why}")
        return "off"
    log.info("timing clients that train together")
    batches = _first_batches(recipe, data, schedule.training[: min(COHORTS[-1], schedule.sampled())])
    found = speedups(model, batches, [size for size in COHORTS if size <= len(batches)])
    best = max(found, key=lambda size: found[size])
    chosen: int | str = best if found[best] >= WORTH_IT else "off"
    listed = ", ".join(f"{size} clients {ratio:.2f}x" for size, ratio in found.items())
    log.info(f"together against alone: {listed}; train.cohort={chosen}")
    return chosen


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
