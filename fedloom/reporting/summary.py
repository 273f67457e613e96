"""Build summary.json: scores, losses and cost of a run, from the coordinator's progress. Nothing is measured here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.common import environment
from fedloom.data.corpus import Partition
from fedloom.data.federated import FederatedData
from fedloom.evaluation.means import Means, PreferenceMeans
from fedloom.federation.record.checkpoints import Evaluation, Progress
from fedloom.federation.record.client_table import MANY, Clients, ClientTable
from fedloom.models.layout import Adapter
from fedloom.recipe.recipe import Recipe
from fedloom.reporting.summary_types import (
    ClientSummary,
    CostSummary,
    DataSummary,
    OffsiteSummary,
    Pair,
    PreferenceSummary,
    Scored,
    Summary,
    VirtualSummary,
    WorstClient,
)

#: Of a client that was not measured.
NOTHING: Means = {"loss": None, "tokens": 0, "score": None, "questions": 0}


@dataclass(frozen=True)
class Measured:
    """What a run measured and spent.

    Attributes:
        table: the evaluations of single clients.
        suite: the name of the paired evaluation, or None.
        score_note: why there is no score, or the empty string.
        spent: the result of `cost` before the reference run.
    """

    progress: Progress
    table: ClientTable
    suite: str | None
    score_note: str
    spent: CostSummary


@dataclass(frozen=True)
class Product:
    """The result of a run.

    Attributes:
        sha256: of the deployed tensors; where clients end with their own, of all personal tensors.
        privacy: the algorithm's guarantee.
        left_server: for an algorithm with an emulator: the parameters and bytes of the model that clients received.
        reference: the summary of the reference run, which tunes the same layers in the full model.
    """

    adapter: Adapter
    sha256: str
    privacy: Mapping[str, Any] | None
    left_server: Mapping[str, int] | None
    reference: Summary | None


def summarise(
    recipe: Recipe, data: FederatedData, partition: Partition, measured: Measured, product: Product
) -> Summary:
    """Return the summary as JSON values; docs/run-folder.md explains each key.

    Args:
        partition: the clients of the recipe, before the `global` baseline pools them.
    """
    progress, tables, adapter = measured.progress, measured.table, product.adapter
    first, last = progress.evaluations[0], progress.evaluations[progress.finished]
    before = tables.clients(0, first.to_json())
    after = tables.clients(progress.finished, last.to_json())
    clients = {name: _client(name, partition, before, after) for name in partition.clients}
    corpus = data.corpus
    return {
        "name": recipe.name,
        "description": recipe.description,
        "algorithm": recipe.algorithm.name,
        "corpus": corpus.name,
        "corpus_license": corpus.license,
        "corpus_source": corpus.source,
        "model": recipe.model.name,
        "base": {"dtype": recipe.model.dtype, "quantization": recipe.model.quantization},
        "adapter": {"method": recipe.adapter.method, "parameters": adapter.layout.numel, "bytes": adapter.nbytes},
        "score": {
            "before": first.score,
            "after": last.score,
            "worst_client": _worst({name: c["score"] for name, c in clients.items()}, worst=min),
            "suite": measured.suite,
            "questions": last.questions,
            "note": measured.score_note,
        },
        "loss": {
            "before": first.loss,
            "after": last.loss,
            "worst_client": _worst({name: c["loss"] for name, c in clients.items()}, worst=max),
        },
        "preference": _preference(first.preference, last.preference),
        "privacy": None if product.privacy is None else dict(product.privacy),
        "offsite": None
        if product.left_server is None
        else _offsite(first, last, product.left_server, product.reference),
        "virtual": _virtual(progress),
        "cost": measured.spent,
        "clients": len(partition.clients),
        "rounds": progress.finished,
        "stopped": progress.stopped,
        "seed": recipe.seed,
        "failures": progress.failures,
        "skipped_steps": progress.skipped_steps,
        "data": _data(data, partition, recipe.data.max_length),
        "per_client": _named(clients),
        "adapter_sha256": product.sha256,
        "versions": environment.versions(),
        "environment": environment.describe(),
        "git": environment.git_commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _data(data: FederatedData, partition: Partition, max_length: int) -> DataSummary:
    """Count the run's examples, and the dropped and truncated ones."""
    shards, sequences = partition.shards.values(), data.sequences
    return {
        "examples": len(data.corpus.examples),
        "train": sum(len(s.train) for s in shards),
        "validation": sum(len(s.validation) for s in shards),
        "test": sum(len(s.test) for s in shards),
        "dropped": {"empty_answer": 0, **data.corpus.dropped},
        "truncated": sequences.truncated,
        "truncated_tokens": sequences.truncated_tokens,
        "max_length": max_length,
    }


def _offsite(first: Evaluation, last: Evaluation, left: Mapping[str, int], reference: Summary | None) -> OffsiteSummary:
    """Return the five results of offsite tuning, each with loss and score, and what left the server."""
    tuned: Scored | None = None
    if reference is not None:
        tuned = {"loss": reference["loss"]["after"], "score": reference["score"]["after"]}
    return {
        "full_zero_shot": {"loss": first.loss, "score": first.score},
        "emulator_zero_shot": _scored(first.emulator),
        "emulator_tuned": _scored(last.emulator),
        "plug_in": {"loss": last.loss, "score": last.score},
        "full_tuned": tuned,
        "note": "" if tuned else "the full model was not tuned: algorithm.reference=false, or the data are at sites",
        "left_server": {
            "parameters": left["parameters"],
            "parameters_of_model": left["parameters_of_model"],
            "bytes": left["bytes"],
            "bytes_of_model": left["bytes_of_model"],
            "share_of_parameters": left["parameters"] / left["parameters_of_model"],
            "share_of_bytes": left["bytes"] / left["bytes_of_model"],
        },
    }


def _preference(first: PreferenceMeans | None, last: PreferenceMeans | None) -> PreferenceSummary | None:
    """Return the results of preference tuning before and after: accuracy, and mean loss and margin of a pair."""
    if first is None or last is None:
        return None
    return {
        "accuracy": {"before": first["accuracy"], "after": last["accuracy"]},
        "loss": {"before": first["loss"], "after": last["loss"]},
        "margin": {"before": first["margin"], "after": last["margin"]},
        "pairs": last["pairs"],
    }


def _scored(measured: Means | None) -> Scored:
    assert measured is not None  # the emulator's, which every evaluation of offsite tuning has
    return {"loss": measured["loss"], "score": measured["score"]}


def _virtual(progress: Progress) -> VirtualSummary | None:
    """Return the virtual time of a run and its loss over virtual time; None where time is real."""
    curve = [[e.virtual_seconds, e.loss] for _, e in sorted(progress.evaluations.items())]
    seconds = curve[-1][0]
    return None if seconds is None else {"seconds": seconds, "loss": curve}


def cost(progress: Progress) -> CostSummary:
    """Return the cost of all messages and work of the run so far, and in separate keys the part of evaluation."""
    total, evaluation = progress.cost, progress.evaluation_cost
    wall, cpu = progress.elapsed()
    return {
        "upload_bytes": total.upload_bytes,
        "download_bytes": total.download_bytes,
        "broadcast_bytes": total.broadcast_bytes,
        "train_tokens": total.train_tokens,
        "train_flops": total.train_flops,
        "steps": total.steps,
        "wall_seconds": round(wall, 3),
        "cpu_seconds": round(cpu, 3),
        "gpu_seconds": round(total.gpu_seconds, 3),
        "evaluation_upload_bytes": evaluation.upload_bytes,
        "evaluation_download_bytes": evaluation.download_bytes,
        "evaluation_broadcast_bytes": evaluation.broadcast_bytes,
        "evaluation_seconds": round(evaluation.wall_seconds, 3),
        "client_cpu_seconds": round(total.cpu_seconds, 3),
        "peak_memory_bytes": environment.peak_memory_bytes(),
        "gpu_utilisation": environment.gpu_utilisation(),
    }


def _named(clients: dict[str, ClientSummary]) -> dict[str, ClientSummary]:
    """Return all clients; of more than `MANY`, those with the highest final loss, in the partition's order."""
    if len(clients) <= MANY:
        return clients
    losses = {name: c["loss"]["after"] for name, c in clients.items() if c["loss"]["after"] is not None}
    kept = set(sorted(losses, key=lambda name: -losses[name])[:MANY])
    return {name: c for name, c in clients.items() if name in kept}


def _client(name: str, partition: Partition, first: Clients, last: Clients) -> ClientSummary:
    shard = partition.shards[name]
    before, after = first.get(name, NOTHING), last.get(name, NOTHING)
    return {
        "train": len(shard.train),
        "test": len(shard.test),
        "loss": {"before": before["loss"], "after": after["loss"]},
        "score": {"before": before["score"], "after": after["score"]},
    }


def _worst(pairs: Mapping[str, Pair], *, worst: Any) -> WorstClient | None:
    """Return the client with the worst value after training, or None. `worst` is min or max."""
    known = {name: pair for name, pair in pairs.items() if pair["after"] is not None}
    if not known:
        return None
    name = worst(known, key=lambda n: known[n]["after"])
    return {"client": name, **known[name]}
