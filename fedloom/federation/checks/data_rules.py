"""What clients and their data rule out: too few of them, or a name that no client has."""

from __future__ import annotations

from fedloom.common.errors import suggest
from fedloom.federation.checks.facts import DataFacts
from fedloom.federation.checks.rule import Rule


def _stranger(f: DataFacts) -> str:
    """The first name in adapter.ranks that no client has: it would silently get everybody's rank."""
    ranks = f.recipe.adapter.ranks
    assert not isinstance(ranks, str), "the devices have settled it"
    return next((client for client in ranks or {} if client not in f.clients.clients), "")


def _independent(f: DataFacts) -> bool:
    """Whether each client is sampled by itself, as the accountant counts it, so that a round may have few clients."""
    privacy = f.recipe.privacy
    return privacy is not None and privacy.where != "client" and f.sampled != f.training


DATA_RULES = (
    Rule[DataFacts](
        "clients.unknown_rank",
        "a client in `adapter.ranks` that does not exist",
        _stranger,
        lambda f, client: f"adapter.ranks names {client}, which is no client: {suggest(client, f.clients.clients)}",
    ),
    Rule[DataFacts](
        "clients.too_few",
        "more `federation.clients_per_round` than clients with training data",
        lambda f: f.sampled > f.training,
        lambda f, _: (
            f"federation.clients_per_round={f.recipe.federation.clients_per_round} but only {f.training} clients hold "
            "training data: ask for fewer, or split among more (split.num_clients)"
        ),
    ),
    Rule[DataFacts](
        "clients.buffer",
        "an `algorithm.buffer` above the number of clients that work at the same time",
        lambda f: f.counted > f.sampled,
        lambda f, _: (
            f"algorithm.buffer={f.counted} but only {f.sampled} clients are in flight: lower it, or raise "
            "federation.clients_per_round"
        ),
    ),
    Rule[DataFacts](
        "clients.quorum",
        "more `federation.min_clients` than a round has updates",
        lambda f: f.recipe.federation.min_clients > f.counted,
        lambda f, _: (
            f"federation.min_clients={f.recipe.federation.min_clients} but a round has {f.counted} "
            f"{'updates' if f.algorithm.properties.asynchronous else 'clients'}: no round could succeed, lower it"
        ),
    ),
    Rule[DataFacts](
        "clients.private_quorum",
        "`federation.min_clients` with `privacy` and sampling at a trusted server",
        lambda f: _independent(f) and 1 < f.recipe.federation.min_clients <= f.counted,
        lambda f, _: (
            f"federation.min_clients={f.recipe.federation.min_clients} cannot be used with privacy and clients_per_round="
            f"{f.recipe.federation.clients_per_round}: each client is sampled independently, so a round may have fewer; "
            "leave it out"
        ),
    ),
)
