"""Nothing here is about loading a model: it is read once."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _loading_once(loading_once: None) -> None:
    pass
