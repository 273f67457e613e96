"""Runs are shared within one worker."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARING = {HERE / f"test_{name}.py" for name in ("algorithms", "cohorts", "matrix")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of one algorithm in one worker, so that the run that they share is made once."""
    for item in items:
        if item.path in SHARING and (name := getattr(item, "callspec", None) and item.callspec.params.get("name")):
            item.add_marker(pytest.mark.xdist_group(f"contract-{name}"))
