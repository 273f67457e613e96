"""Which paired evaluation a recipe means."""

from __future__ import annotations

from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.data.corpus import Corpus
from fedloom.data.loading import source_of
from fedloom.evaluation.suites import Suite
from fedloom.recipe.recipe import Recipe


def check_suite(wanted: str | None) -> None:
    """Raise UserError for a suite that no run can measure every round. `wanted` is the recipe's: a name, auto or None."""
    if wanted is None or wanted == "auto":
        return
    if wanted in registry.task_suites and wanted not in registry.suites:
        raise UserError(
            f"evaluation.suite={wanted} is measured once, after the run: `fedloom evaluate RUN --suite {wanted}`; a run can "
            f"measure {', '.join(registry.suites.names())} every round"
        )
    registry.suites.get(wanted)


def pick_suite(recipe: Recipe, corpus: Corpus, without: str = "") -> tuple[Suite | None, str]:
    """The paired evaluation; or None, and why there is none.

    Args:
        without: why a corpus without a suite has none; empty asks the corpus's source.
    """
    wanted = recipe.evaluation.suite
    check_suite(wanted)
    if wanted is None:
        return None, "the recipe asks for no score (evaluation.suite=null)"
    if wanted != "auto":
        return registry.suites.get(wanted), ""
    if corpus.suite is not None:
        return registry.suites.get(corpus.suite), ""
    return (
        None,
        without or source_of(recipe.data).suite_note or f"{corpus.name} has no paired evaluation that runs here",
    )
