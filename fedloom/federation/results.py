"""A result put into the live model: to score it, to save it, to ask it a question.

What is deployed is the algorithm's to say: one adapter for all, or one for each client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fedloom.algorithms.base import Algorithm, Deployed
from fedloom.common.files import folder_name
from fedloom.data.federated import FederatedData
from fedloom.data.prompts import Template
from fedloom.evaluation.loss import loss_sums
from fedloom.evaluation.means import Sums
from fedloom.evaluation.score import score
from fedloom.evaluation.suites import Suite
from fedloom.federation.coordinator import Coordinator
from fedloom.federation.evaluator import ServerMeasure
from fedloom.federation.record.run_folder import RunFolder
from fedloom.models.adapters import AdaptedModel
from fedloom.models.saved import save_base_delta
from fedloom.recipe.recipe import Recipe


def deploy(model: AdaptedModel, deployed: Deployed) -> None:
    """Put a result into the live model."""
    model.set_base_delta(deployed.base_delta)
    model.adapter.copy_(deployed.adapter.flat)


def server_measure(
    recipe: Recipe, model: AdaptedModel, template: Template, suite: Suite | None, data: FederatedData, *, offsite: bool
) -> ServerMeasure | None:
    """Measures a result where no client can: on the corpus's own test set, which the server holds.

    Args:
        offsite: clients do not hold what is deployed: it is measured here on all test data together, loss included,
            which only a simulator has. Without: questions alone, and None where the corpus has no test set.
    """
    questions = data.pooled().questions if offsite else data.server_questions
    packed = recipe.train.packing == "on"
    settings = recipe.evaluation
    if not offsite and (suite is None or not questions):
        return None

    def measure(deployed: Deployed) -> Sums:
        deploy(model, deployed)
        sums = Sums()
        if offsite:
            loss = loss_sums(model, data.sequences, data.pooled().test, batch_size=settings.batch_size, packed=packed)
            sums = Sums(*loss)
        if suite is not None and questions:
            right = score(
                model,
                template,
                suite,
                questions,
                batch_size=settings.batch_size,
                max_length=recipe.data.max_length,
                max_new_tokens=settings.max_new_tokens,
                packed=packed,
            )
            sums = replace(sums, right=sum(right), questions=len(right))
        return sums

    return measure


def save_result(
    algorithm: Algorithm, model: AdaptedModel, base: str, folder: RunFolder, coordinator: Coordinator
) -> str:
    """Write what the run is for: `adapter/`, or `adapters/<client>/`. Returns the digest of the deployed tensors.

    Args:
        base: the base model's name, written into the adapter's configuration.
    """
    if algorithm.properties.personal:
        return personal_digest(coordinator.save_personal())
    deployed = algorithm.deployed()
    deploy(model, deployed)
    model.save(folder / "adapter", base)
    if deployed.base_delta:
        save_base_delta(folder / "adapter", deployed.base_delta)
    return deployed.sha256()


def result_loader(algorithm: Algorithm, model: AdaptedModel, folder: RunFolder) -> Callable[[str], None]:
    """Puts the result that serves a client into the live model: its own where it has one, the global one otherwise."""

    def load(client: str) -> None:
        own: Path = folder / "adapters" / folder_name(client)
        if algorithm.properties.personal and client and own.is_dir():
            model.load(own)
        else:
            deploy(model, algorithm.deployed())

    return load


def personal_digest(digests: Mapping[str, str]) -> str:
    """One sha256 (hex) over the clients' own, in name order."""
    lines = "".join(f"{client}\0{digest}\n" for client, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
