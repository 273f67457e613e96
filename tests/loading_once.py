"""The tests' models, read from disk once in a session: each asker gets a copy of its own, so that no test sees another's.

For suites that make hundreds of tiny runs and are not about loading; tests/models has those that are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest

from fedloom.config import ModelConfig
from fedloom.models import adapters
from fedloom.models.loading import Base

LOADED: dict[tuple[str, str], Base] = {}


@pytest.fixture(scope="session")
def loading_once() -> Iterator[None]:
    load: Callable[..., Base] = adapters.load_base

    def copied(config: ModelConfig, device: str = "cpu", say: Callable[[str], None] = lambda text: None) -> Base:
        key = config.model_dump_json(), device
        if key not in LOADED:
            LOADED[key] = load(config, device, say)
        kept = LOADED[key]
        return Base(copy.deepcopy(kept.model), kept.tokenizer, kept.source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "load_base", copied)
        yield
