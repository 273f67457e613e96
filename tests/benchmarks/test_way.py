"""One plain round stays short: how many files it runs through, and how many generators an update passes."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.simulator import Simulator
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("no_waiting", "no_reports")

#: Other ways for an update: without a barrier, and in virtual time, where late ones are dropped.
OTHERS = {
    "asynchronous": {"algorithm": {"name": "fedbuff", "buffer": 2}},
    "virtual time": {"devices": {"deadline": 1e9}},
    "operators": {"operators": {"up": ["bf16"]}},
}


@pytest.fixture
def way(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("way")


def test_a_plain_round_runs_through_few_files_and_its_updates_through_four_generators(way, tmp_path):
    walked = way.walked(way.recipe_for(tmp_path), tmp_path / "run")
    assert len(walked.files) <= way.FILES == 25, list(walked.files)
    assert len(walked.generators) <= way.GENERATORS == 4, walked.generators
    # what it has to see for the count to mean anything
    names = {file for file, _ in walked.functions}
    assert {"federation/coordinator.py", "federation/client.py", "training/trainer.py", "messages/wire.py"} <= names
    assert walked.functions["federation/client.py", "Client._train"] == 3
    assert walked.generators[-1] == "Simulator.run"


@pytest.mark.parametrize("case", OTHERS)
def test_no_way_of_an_update_has_more_generators(way, tmp_path, case):
    recipe: Recipe = way.recipe_for(tmp_path).with_values(OTHERS[case])
    walked = way.walked(recipe, tmp_path / "run")
    assert 2 <= len(walked.generators) <= way.GENERATORS, walked.generators
    assert walked.generators[-1] == "Simulator.run"


def test_another_generator_is_counted(way, tmp_path, monkeypatch):
    plain = Simulator.run

    def run(self, assignments):
        yield from plain(self, assignments)

    # as if it stood in the package, whose generators alone are counted
    code = run.__code__.replace(co_filename=str(way.ROOT / "runtimes" / "simulator.py"))
    run.__code__ = code
    monkeypatch.setattr(Simulator, "run", run)
    walked = way.walked(way.recipe_for(tmp_path), tmp_path / "run")
    assert len(walked.generators) == way.GENERATORS + 1
