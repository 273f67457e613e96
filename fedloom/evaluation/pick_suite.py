"""Pick the paired evaluation of a recipe."""

from __future__ import annotations

from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.data.corpus import Corpus
from fedloom.data.loading import source_of
from fedloom.evaluation.suites import Suite
from fedloom.recipe.recipe import Recipe


def public_suite_message(suite: str) -> str:
    """Return the error message for a recipe whose suite is a public benchmark."""
    return (
        f"evaluation.suite={suite} is measured once, after the run: `fedloom evaluate RUN --suite {suite}`; a run can "
        f"measure {', '.join(registry.suites.names())} every round"
    )


def pick_suite(recipe: Recipe, corpus: Corpus, without: str = "") -> tuple[Suite | None, str]:
    """Pick the paired evaluation. Returns (suite, ""), or (None, why there is none).

    Args:
        without: why a corpus without a suite has none; empty takes the reason that the corpus's source gives.

    Raises:
        UserError: the suite is unknown, or is a public benchmark.
    """
    wanted = recipe.evaluation.suite
    if wanted is None:
        return None, "the recipe asks for no score (evaluation.suite=null)"
    if wanted in registry.task_suites and wanted not in registry.suites:
        raise UserError(public_suite_message(wanted))
    if wanted != "auto":
        return registry.suites.get(wanted), ""
    if corpus.suite is not None:
        return registry.suites.get(corpus.suite), ""
    return (
        None,
        without or source_of(recipe.data).suite_note or f"{corpus.name} has no paired evaluation that runs here",
    )
