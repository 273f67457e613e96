"""A run of the suite ends with what did not run and why; with FEDLOOM_CI=1 only the skips of ALLOWED pass.

tests/conftest.py takes the hooks from here. With pytest-xdist the workers collect and skip, and the controller prints.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

import pytest

#: Marker → the make target that runs its tests; `make test` leaves them out.
TARGETS = {
    "slow": "make test-slow",
    "faults": "make test-faults",
    "gguf": "make test-gguf",
    "quantised": "make test-quantised",
}

#: Reasons for which a test may be skipped where FEDLOOM_CI=1, as regular expressions. Whatever can be installed is none.
ALLOWED = (
    r"FEDLOOM_DATA is not set",  # data sets that nobody may hand on
    r"a GPU is here",
    r"root may write everywhere",
)

LEFT_OUT = pytest.StashKey[Counter[str]]()


def strict() -> bool:
    return os.environ.get("FEDLOOM_CI") == "1"


def allowed(reason: str) -> bool:
    return any(re.search(pattern, reason) for pattern in ALLOWED)


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Make a skip a failure, unless it is an expected failure or its reason is allowed."""
    if not (strict() and report.skipped) or hasattr(report, "wasxfail") or allowed(reason_of(report)):
        return
    report.longrepr = f"With FEDLOOM_CI=1 this may not be skipped: {reason_of(report)}. Install what it needs."
    report.outcome = "failed"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module's `importorskip` is a skip as well."""
    report = yield
    refuse(report)
    return report


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Counted where a marker leaves tests out; who selects by name knows what he left out."""
    for item in items if items[0].config.getoption("markexpr") else ():
        marks = [name for name in TARGETS if item.get_closest_marker(name)]
        item.config.stash.setdefault(LEFT_OUT, Counter()).update(marks)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(LEFT_OUT, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects everything, so one worker's count is the whole."""
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, Counter())
    skipped = Counter(reason_of(report) for report in terminalreporter.stats.get("skipped", []))
    if not (left_out or skipped):
        return
    terminalreporter.section("what did not run")
    for name, target in TARGETS.items():
        if left_out[name]:
            terminalreporter.line(f"{left_out[name]:5} left out, run by `{target}`")
    for reason, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0])):
        terminalreporter.line(f"{count:5} skipped: {reason}")
