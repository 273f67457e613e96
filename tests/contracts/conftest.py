"""Nothing here is about loading a model, a disk or a report (quick.py), and runs are shared within one worker."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of one algorithm in one worker, so that the run that they share is made once."""
    for item in items:
        if item.path.parent == HERE and (name := getattr(item, "callspec", None) and item.callspec.params.get("name")):
            item.add_marker(pytest.mark.xdist_group(f"contract-{name}"))


@pytest.fixture(autouse=True)
def _quick(loading_once: None, no_waiting: None, no_reports: None) -> None:
    pass
