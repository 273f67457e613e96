"""For suites that make hundreds of tiny runs: what costs them time and is not what they are about.

A model is read from disk once, and each asker gets a copy of its own (tests/models is about loading). Nothing waits for the
disk (tests/faults is about that). Reports and peft's model cards are not written (tests/reporting, tests/models are).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest

from fedloom.models import attach
from fedloom.models.loading import Base
from fedloom.recipe.recipe import ModelConfig

LOADED: dict[tuple[str, str], Base] = {}


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture
def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.experiment.run.write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr("peft.PeftModel.create_or_update_model_card", lambda model, folder: None)


@pytest.fixture
def loading_once(monkeypatch: pytest.MonkeyPatch) -> None:
    load: Callable[..., Base] = attach.load_base

    def copied(config: ModelConfig, device: str = "cpu", on: str | None = None) -> Base:
        key = config.model_dump_json(), device
        if key not in LOADED:
            LOADED[key] = load(config, device, on)
        kept = LOADED[key]
        return Base(copy.deepcopy(kept.model), kept.tokenizer, kept.source)

    monkeypatch.setattr(attach, "load_base", copied)
