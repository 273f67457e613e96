"""Nothing here is about loading a model, a disk or a report (helpers/quick.py)."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quick(loading_once: None, no_waiting: None, no_reports: None) -> None:
    pass
