"""Splitters with unequal clients: in size, in labels, or because each client is one natural owner.

As those of splitters.py, each assigns example indices to clients and loses none. This file does not know what is done
with a client's share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedloom.common.errors import UserError
from fedloom.data.splitters import (
    UNSPECIFIED,
    apportion,
    draw_proportions,
    min_examples,
    name_clients,
    number_clients,
    top_up,
)
from fedloom.recipe.recipe import SplitConfig

#: Under `natural`, the client of all owners whose own share is too small to train on.
OTHERS = "others"


def quantity(categories: Sequence[str], split: SplitConfig, rng: np.random.Generator) -> dict[str, list[int]]:
    """Draw sizes once in proportions from Dir(α, …, α), and assign examples at random: small α gives unequal clients.

    Source: Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", arXiv 2102.02079, quantity
        skew.

    Raises:
        UserError: no alpha, or too few examples for `min_size` at every client.
    """
    names = number_clients(split, len(categories))
    if split.alpha is None:
        raise UserError("the splitter quantity needs split.alpha: small is unequal, large is even, try split.alpha=0.5")
    order = rng.permutation(len(categories)).tolist()
    parts, start = [], 0
    for count in apportion(len(order), draw_proportions(split.alpha, len(names), rng)):
        parts.append(order[start : start + count])
        start += count
    top_up(parts, split, len(categories))
    return dict(zip(names, parts, strict=True))


def shards(categories: Sequence[str], split: SplitConfig, rng: np.random.Generator) -> dict[str, list[int]]:
    """Sort examples by category, cut them into equal shards, and give each client `split.shards` of them at random.

    A client gets about that many categories; sizes differ by at most `split.shards`.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    arXiv 1602.05629, section 3 (their pathological split has two shards).

    Raises:
        UserError: more shards than examples.
    """
    names = number_clients(split, len(categories))
    count = split.shards * len(names)
    if count > len(categories):
        raise UserError(
            f"split.shards={split.shards} for {len(names)} clients makes {count} shards, more than the {len(categories)} "
            "examples: lower split.shards or split.num_clients"
        )
    shuffled = rng.permutation(len(categories))
    ordered = sorted(shuffled.tolist(), key=lambda i: categories[i])
    cut = np.array_split(np.array(ordered, dtype=int), count)
    dealt = rng.permutation(count).reshape(len(names), split.shards)
    return {name: [int(i) for k in own for i in cut[k]] for name, own in zip(names, dealt, strict=True)}


def natural(categories: Sequence[str], split: SplitConfig, rng: np.random.Generator) -> dict[str, list[int]]:
    """Make one client per owner in the column `by`; owners with too little to train on become one client, `others`.

    With `num_clients` the largest owners are clients of their own, one fewer than that, and all the rest are `others`.

    Source: Caldas et al., "LEAF: A Benchmark for Federated Settings", arXiv 1812.01097 (data by who wrote them).

    Raises:
        UserError: no values in the column, or more clients than owners.
    """
    members: dict[str, list[int]] = {}
    for i, owner in enumerate(categories):
        members.setdefault(owner or UNSPECIFIED, []).append(i)
    if not any(categories):
        raise UserError(
            f"the splitter natural finds no owner in the column {split.by!r}: set split.by to the column that names them"
        )
    if (split.num_clients or 0) > len(members):
        raise UserError(
            f"split.num_clients={split.num_clients} is more than the {len(members)} owners in {split.by!r}: lower it, or "
            "take split.splitter=uniform"
        )
    by_size = sorted(members, key=lambda owner: (-len(members[owner]), owner))
    alone = len(members) if split.num_clients in {None, len(members)} else split.num_clients - 1
    kept = [owner for owner in by_size[:alone] if len(members[owner]) >= min_examples(split)]
    rest = [i for owner in by_size if owner not in set(kept) for i in members[owner]]
    if 0 < len(rest) < min_examples(split) and kept:  # too little even together: the smallest owner gets it
        members[kept[-1]] += rest
        rest = []
    parts = dict(zip(name_clients([owner] for owner in sorted(kept)), (members[o] for o in sorted(kept)), strict=True))
    if rest:
        parts[next(name for name in (OTHERS, f"{OTHERS}-2") if name not in parts)] = rest
    return parts
