"""A result put into the live model: to score it, to save it, to ask it a question.

What is deployed is the algorithm's to say: one adapter for all, or one for each client.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedloom.algorithms.base import Algorithm, Deployed
from fedloom.checkpoint import folder_name
from fedloom.config import Recipe
from fedloom.coordinator import Coordinator, ServerScorer
from fedloom.data.federated import FederatedData
from fedloom.data.prompts import Template
from fedloom.evaluation.score import score
from fedloom.evaluation.suites import Suite
from fedloom.models.adapters import AdaptedModel
from fedloom.models.results import save_base_delta
from fedloom.runfolder import RunFolder
from fedloom.summary import personal_digest


def deploy(model: AdaptedModel, deployed: Deployed) -> None:
    """Put a result into the live model."""
    model.set_base_delta(deployed.base_delta)
    model.adapter.copy_(deployed.adapter.flat)


def server_scorer(
    recipe: Recipe, model: AdaptedModel, template: Template, suite: Suite | None, data: FederatedData
) -> ServerScorer | None:
    """Scores the corpus's own test set, which no client holds; None where it has none."""
    questions = data.server_questions
    if suite is None or not questions:
        return None

    def scorer(deployed: Deployed) -> tuple[int, int]:
        deploy(model, deployed)
        right = score(
            model,
            template,
            suite,
            questions,
            batch_size=recipe.evaluation.batch_size,
            max_length=recipe.data.max_length,
            max_new_tokens=recipe.evaluation.max_new_tokens,
            packed=recipe.train.packing == "on",
        )
        return sum(right), len(right)

    return scorer


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
