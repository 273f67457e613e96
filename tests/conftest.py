"""Shared fixtures. fedloom comes first, since it sets what torch reads when it is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub; read when transformers is imported

import fedloom  # isort: skip
import pytest
import torch

from fedloom.common import registry
from fedloom.models.loading import locate
from fedloom.recipe.recipe import ModelConfig, Recipe
from tests.helpers import tiny
from tests.helpers.launch import cli, launch_folder, recipe_file  # noqa: F401
from tests.helpers.quick import loading_once, no_reports, no_waiting  # noqa: F401
from tests.helpers.skips import (  # noqa: F401
    pytest_deselected,
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

#: The cache that downloads go to; every other test has an empty one of its own.
REAL_HOME = os.environ.get("FEDLOOM_HOME")

assert fedloom.common.environment.late_settings() == [], "something imported torch before fedloom"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group: tests that run in one worker (pytest-xdist)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    offline = os.environ.get("FEDLOOM_OFFLINE") == "1"
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):  # one worker holds the real model
            item.add_marker(pytest.mark.network)
            item.add_marker(pytest.mark.xdist_group("smollm2"))
        if any(item.get_closest_marker(name) for name in ("slow", "faults", "gguf")):
            item.add_marker(pytest.mark.timeout(3600))
        if offline and item.get_closest_marker("network"):
            item.add_marker(pytest.mark.skip(reason="FEDLOOM_OFFLINE=1"))


@pytest.fixture(scope="session", autouse=True)
def fedloom_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache for this session, so that no test sees or leaves anything in the user's."""
    home = tmp_path_factory.mktemp("fedloom-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLOOM_HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Workers share the cores; a test that needs other thread counts sets them and is cleaned up after."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a byte tokenizer, for `model: FOLDER`."""
    return tiny.save_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 made-up rows in three categories of 10, 20 and 30."""
    return tiny.write_rows(tmp_path_factory.mktemp("tiny-data") / "rows.jsonl")


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with five layers, for algorithms that cut the model."""
    return tiny.save_model(tmp_path_factory.mktemp("deep-model"), tiny.causal_lm(num_hidden_layers=5))


@pytest.fixture(scope="session")
def public_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen rows that no client holds."""
    return tiny.write_rows(tmp_path_factory.mktemp("public-data") / "public.jsonl", 12, seed=5)


@pytest.fixture
def tiny_recipe(tiny_model: Path, tiny_data: Path, deep_model: Path, public_data: Path) -> Callable[..., Recipe]:
    """A function of dotted overrides: ``tiny_recipe({"train.lr": 1e-2}, seed=3)``.

    Three clients (8, 15 and 22 training examples), two rounds of two steps, no score, under a second a run. An algorithm
    that cuts the model, given by its name alone, gets layers to cut and what its options need; one that draws random
    directions draws few.
    """

    def cutting(name: str) -> dict[str, Any]:
        fields = registry.algorithms.get(name).Options.model_fields
        align = {"path": str(public_data), "steps": 1, "max_length": 48, "template": "plain"}
        wanted = {"bottom": 1, "top": 1, "drop": 0.34, "reference": False, "align": align}
        options = {k: v for k, v in wanted.items() if k in fields} if "bottom" in fields else {}
        if "bases" in fields:
            return {"algorithm": {"name": name, "bases": 64}}
        return {"algorithm": {"name": name, **options}, "model": str(deep_model)} if options else {}

    def make(overrides: Mapping[str, Any] | None = None, **more: Any) -> Recipe:
        values: dict[str, Any] = {
            "name": "tiny",
            "model": str(tiny_model),
            "data": {"path": str(tiny_data), "max_length": 96, "template": "plain"},
            "split": {"splitter": "meta", "test": 0.2, "validation": 0.05},
            "adapter": {"rank": 2, "alpha": 4},
            "train": {"steps": 2, "batch_size": 2, "lr": 1e-2},
            "federation": {"rounds": 2},
            "runtime": {"threads": 1, "device": "cpu"},
            "evaluation": {"suite": None, "answers": 0},
        }
        given = {**(overrides or {}), **more}
        name = given.get("algorithm")
        if isinstance(name, dict) and set(name) == {"name"}:
            name = name["name"]
        if isinstance(name, str) and name in registry.algorithms:
            given |= cutting(name)
        return Recipe.parse(values, given)

    return make


@pytest.fixture
def dealt(tmp_path: Path) -> Callable[[Recipe], dict[str, Path]]:
    """A function of a recipe: client → a shard file, as the simulator splits the corpus."""

    def deal(recipe: Recipe) -> dict[str, Path]:
        from fedloom.experiment.local_sites import deal as deal_shards
        from fedloom.federation.workplace import find_data

        found = find_data(recipe)
        files = {c: tmp_path / "data" / f"{c}.jsonl" for c in found.clients.clients}
        deal_shards(recipe, found, files)
        return files

    return deal


@pytest.fixture(scope="session")
def smollm2(fedloom_home: Path) -> Path:
    """The folder of the built-in model, from the user's own cache, fetched there on first use. Implies `network`."""
    with pytest.MonkeyPatch.context() as patch:
        if REAL_HOME is None:
            patch.delenv("FEDLOOM_HOME")
        else:
            patch.setenv("FEDLOOM_HOME", REAL_HOME)
        folder = Path(locate(ModelConfig(name="smollm2-135m"))[0])
    link = fedloom_home / "models" / folder.name  # under its name it is found in the session's cache as well
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(folder)
    return folder
