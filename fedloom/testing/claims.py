"""The checks of what an algorithm declares in `properties` and `about`: functions of a `Case` that return sentences."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch

from fedloom.algorithms.about import About
from fedloom.messages.types import Payload, Update
from fedloom.testing.case import Case
from fedloom.testing.compare import aggregated, flat, near, size

#: Bytes of small counters for each client, which `about.server` may leave out.
COUNTERS = 32


def check_order(case: Case) -> list[str]:
    """Under `properties.order_independent` the order of the updates changes nothing but rounding."""
    if not case.properties.order_independent:
        return []
    forwards, backwards = (aggregated(case.server(), u) for u in (case.first_updates(), case.first_updates()[::-1]))
    if near(forwards, backwards):
        return []
    return [
        "aggregate() gives another result for the same updates in another order, and properties.order_independent is true: "
        "do not depend on the order, or set order_independent=False"
    ]


def check_linear_sum(case: Case) -> list[str]:
    """Under `properties.linear_sum` two updates may be replaced by their weighted mean, as a secure sum would."""
    updates = case.first_updates()
    if not case.properties.linear_sum or case.properties.pooled or len(updates) < 2:
        return []
    first, second, *rest = updates
    total = first.num_examples + second.num_examples
    mean = {
        n: (first.num_examples * t.double() + second.num_examples * second.payload.tensors[n].double()) / total
        for n, t in first.payload.tensors.items()
    }
    payload = Payload({n: t.float() for n, t in mean.items()})
    merged = replace(first, payload=payload, num_examples=total, num_tokens=first.num_tokens + second.num_tokens)
    if near(aggregated(case.server(), [merged, *rest]), aggregated(case.server(), updates)):
        return []
    return [
        "properties.linear_sum is true, but aggregate() gives another result when two updates are replaced by their mean, "
        "weighted by examples: privacy and secure sums rely on that, so set linear_sum=False"
    ]


def check_streams(case: Case) -> list[str]:
    """Under `properties.streams` aggregation holds one update at a time."""
    if not case.properties.streams:
        return []
    seen: list[list[weakref.ref[torch.Tensor]]] = []
    late: list[int] = []

    def updates() -> Iterator[Update]:
        for index in range(len(case.whole.log.updates[0])):
            update = case.first_updates()[index]
            if any(ref() is not None for refs in seen[:-1] for ref in refs):
                late.append(index)
            seen.append([weakref.ref(t) for t in update.payload.tensors.values()])
            yield update
            del update

    case.server().aggregate(updates())
    if len(seen) < len(case.whole.log.updates[0]):
        return ["aggregate() did not read all updates: read the iterator to its end"]
    if not late:
        return []
    return [
        "aggregate() still holds an update when it reads the one after the next, and properties.streams is true: fold one "
        "update at a time, as WeightedMean does, or set streams=False"
    ]


def check_costs(case: Case) -> list[str]:
    """Bytes that `about` declares are those that were sent and stored."""
    said, log, found = vars(case.cls).get("about"), case.whole.log, []
    if not isinstance(said, About) or case.recipe.adapter.method != "lora":
        return []
    for number in (1, 2):
        sizes, clients = case.sizes(number), sorted(c for c, r in log.up if r == number)
        ways = [("up", log.up, said.up), ("down", log.down, said.down)]
        if case.properties.offsite and number == 1:
            ways.pop()  # the model itself, which the summary's left_server counts
        for way, messages, formula in ways:
            seen, declared = {size(messages[c, number]) for c in clients}, formula(sizes)
            fits = all(declared // 2 <= s <= declared for s in seen) if said.at_most else seen == {declared}
            if not fits and clients:
                bound = "at most " if said.at_most else ""
                found.append(
                    f"about.{way} says {bound}{declared} bytes in round {number}, but {_numbers(seen)} were in the message: "
                    "count every tensor, 4 bytes for each float32"
                )
        kept, declared = {size(log.kept[c, number]) for c in clients if (c, number) in log.kept}, said.client(sizes)
        if kept - {declared}:
            found.append(
                f"about.client says {declared} bytes after round {number}, but {_numbers(kept)} are kept of a client"
            )
        state, declared = size(log.states[number - 1]), said.server(sizes)
        if not 0 <= state - declared <= COUNTERS * len(clients):
            found.append(
                f"about.server says {declared} bytes after round {number}, but the server's state has {state}: `shared` and "
                "what lies in self.kept count"
            )
    return found[:4]


def _numbers(seen: set[int]) -> str:
    return " and ".join(map(str, sorted(seen)[:3]))


def check_personal(case: Case) -> list[str]:
    """Under `properties.personal` clients keep something of their own, and none of it is in any message."""
    log = case.whole.log
    if not case.properties.personal:
        return []
    kept = [t for payload in log.kept.values() for t in payload.tensors.values() if t.numel() > 1 and t.any()]
    if not kept:
        return [
            "properties.personal is true, but no client keeps a tensor: put the client's own model into self.kept, or leave "
            "personal out"
        ]
    travelled = [t for p in (*log.up.values(), *log.down.values()) for t in p.tensors.values()]
    if any(t.shape == own.shape and torch.equal(t, own) for own in kept for t in travelled):
        return ["a tensor that a client keeps as its own was in a message: send other tensors than those in self.kept"]
    return []


def check_mixed_ranks(case: Case) -> list[str]:
    """Under `properties.mixed_ranks` clients with ranks of their own train and are aggregated."""
    if not case.properties.mixed_ranks or case.recipe.adapter.method != "lora":
        return []
    clients = sorted({c for c, _ in case.whole.log.up})
    ranks = {client: 1 + number % 2 for number, client in enumerate(clients)}
    try:
        run = case.run({"adapter.ranks": ranks, "adapter.rank": 2})
    except Exception as error:  # another's code
        return [f"properties.mixed_ranks is true, but a run with adapter.ranks={ranks} ended with: {error}"]
    if run.log.refused:
        return [
            f"properties.mixed_ranks is true, but with adapter.ranks={ranks} accept() refused: {run.log.refused[0][1]}"
        ]
    sent = {rank: max(size(p) for (c, _), p in run.log.up.items() if ranks[c] == rank) for rank in {*ranks.values()}}
    if len(sent) == 2 and sent[1] >= sent[2]:
        return [
            f"properties.mixed_ranks is true, but a client of rank 1 sends {sent[1]} bytes and one of rank 2 {sent[2]}: use "
            "self.adapter.ranks, or leave mixed_ranks out"
        ]
    return []


def check_cohorts(case: Case) -> list[str]:
    """Under `properties.cohorts` clients that train in one pass send what each sends alone, up to rounding."""
    if not case.properties.cohorts or case.properties.pooled:
        return []
    values = {"train.eps": 1e-4, "federation.rounds": 1, "adapter.dropout": 0.0}
    alone = case.run(values).log.up
    try:
        together = case.run({**values, "train.cohort": 3}).log.up
    except Exception as error:  # another's code
        return [f"properties.cohorts is true, but a run with train.cohort=3 ended with: {error}. Set cohorts=False"]
    far = [c for c, n in alone if not near(flat(alone[c, n]), flat(together.get((c, n), Payload())))]
    if not far:
        return []
    return [
        f"properties.cohorts is true, but with train.cohort=3 client {far[0]} sends something else than alone: set "
        "cohorts=False, unless the client half keeps a value that belongs to another client"
    ]


def check_neutral(case: Case) -> list[str]:
    """With `properties.neutral` one client's run is plain local training, which FedAvg with one client is."""
    claims = case.properties
    if (
        claims.neutral is None or claims.offsite or claims.pooled
    ):  # these train other layers, or a client of another name
        return []
    one = {"split.splitter": "uniform", "split.num_clients": 1, "federation.rounds": 2}
    own = {f"algorithm.{k}": v for k, v in claims.neutral.items()}
    mine = case.run({**one, **own}).bits
    plain = case.plain(one).bits
    results = [{n.rpartition("/")[2]: v for n, v in b.items() if "adapter_model" in n} for b in (mine, plain)]
    if results[0] == results[1]:
        return []
    return [
        f"properties.neutral is {dict(claims.neutral)}, but with it one client does not end with the bits of plain "
        "local training: correct the options, or leave neutral out"
    ]
