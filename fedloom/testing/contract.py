"""Check an algorithm's class against everything that fedloom asks of one.

    from fedloom.testing import check_algorithm

    def test_my_algorithm():
        check_algorithm(MyAlgorithm)

It needs no fixtures, no download and a handful of seconds: a tiny random model and made-up rows lie in a temporary folder.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom.algorithms.base import Algorithm
from fedloom.common import registry
from fedloom.testing import checks, claims, tiny
from fedloom.testing.case import Case

#: In the order in which they are worth reading.
CHECKS: dict[str, Callable[[Case], list[str]]] = {
    "words": checks.check_words,
    "layout": checks.check_layout,
    "repeatable": checks.check_repeatable,
    "client state": checks.check_client_state,
    "resume": checks.check_resume,
    "server state": checks.check_server_state,
    "refusals": checks.check_refusals,
    "order": claims.check_order,
    "linear sum": claims.check_linear_sum,
    "streams": claims.check_streams,
    "costs": claims.check_costs,
    "personal": claims.check_personal,
    "mixed ranks": claims.check_mixed_ranks,
    "cohorts": claims.check_cohorts,
    "neutral": claims.check_neutral,
}


@dataclass(frozen=True)
class Report:
    """What `check_algorithm` found.

    Attributes:
        algorithm: the class's name.
        problems: check → its sentences; a check that passed has none.
        seconds: how long all of it took.
    """

    algorithm: str
    problems: Mapping[str, list[str]]
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """All that is wrong, in the order of the checks."""
        return [s for sentences in self.problems.values() for s in sentences]

    def __str__(self) -> str:
        lines = [f"{self.algorithm}: {len(self.problems)} checks, {len(self.sentences)} problems, {self.seconds:.1f} s"]
        return "\n".join([*lines, *(f"  {check}: {s}" for check, found in self.problems.items() for s in found)])


class ContractBroken(AssertionError):
    """An algorithm does not do what fedloom asks of it; the message has every sentence, `report` the rest."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


def check_algorithm(
    cls: type[Algorithm],
    *,
    options: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
) -> Report:
    """Run every check on a class.

    Args:
        cls: the class. It need not be registered.
        options: its own options, as a recipe has them beside its name.
        recipe: other keys of the recipe, dotted, such as ``{"adapter.method": "ia3"}``.
        only: names of checks (`fedloom.testing.contract.CHECKS`); by default all.

    Returns:
        What was checked, if nothing is wrong.

    Raises:
        ContractBroken: with all sentences.
    """
    began, name = time.perf_counter(), f"checked-{cls.__name__.lower()}"
    with tempfile.TemporaryDirectory(prefix="fedloom-check-") as scratch, _aside(Path(scratch)):
        registry.algorithms.register(name, cls)
        try:
            registry.algorithms.get(name)  # a class that is no algorithm, or lacks a method, is refused here
            values = {"adapter.dropout": 0.1, "train.optimizer_state": "keep", **(recipe or {})}
            made = tiny.recipe(Path(scratch), {"algorithm": {"name": name, **(options or {})}, **values})
            problems = run_checks(Case(cls, name, made, Path(scratch) / "runs"), only)
        finally:
            registry.algorithms.forget(name)
    report = Report(cls.__name__, problems, time.perf_counter() - began)
    if report.sentences:
        raise ContractBroken(report)
    return report


def run_checks(case: Case, only: Collection[str] = ()) -> dict[str, list[str]]:
    """Check → sentences. Where a plain run fails there is nothing else to check."""
    wanted = {name: check for name, check in CHECKS.items() if not only or name in only}
    problems = {"words": wanted.pop("words")(case)} if "words" in wanted else {}
    trouble = first_run(case)
    if trouble:
        return {**problems, "run": trouble}
    return {**problems, **{name: check(case) for name, check in wanted.items()}}


def first_run(case: Case) -> list[str]:
    """Why a plain run of three rounds does not end; empty where it does."""
    try:
        _ = case.whole
    except Exception as error:  # another's code, which may do anything
        return checks.refused(case.newest) or [f"a run of three rounds ended with {type(error).__name__}: {error}"]
    return []


@contextmanager
def _aside(folder: Path) -> Iterator[None]:
    """Leave nothing in the user's cache, and torch's threads and generator as they were."""
    home, threads, state = os.environ.get("FEDLOOM_HOME"), torch.get_num_threads(), torch.get_rng_state()
    os.environ["FEDLOOM_HOME"] = str(folder / "home")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        os.environ.pop("FEDLOOM_HOME")
        if home is not None:
            os.environ["FEDLOOM_HOME"] = home
