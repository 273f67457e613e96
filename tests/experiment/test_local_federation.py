"""`runtime.name=distributed`: the whole run is handed to the processes of a federation on this machine."""

from __future__ import annotations

import sys

import pytest

from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.experiment import local_sites
from fedloom.experiment.local_federation import LocalFederation
from fedloom.experiment.run import run
from fedloom.federation.watch import Watch
from fedloom.runtimes.sites.runtime import Distributed


def test_it_is_the_runtime_between_sites_and_conducts_runs():
    assert registry.runtimes.get("distributed") is LocalFederation
    assert LocalFederation.capabilities.conducts and not Distributed.capabilities.conducts
    assert LocalFederation.capabilities.ranks and not LocalFederation.capabilities.virtual


def test_a_run_is_conducted_with_all_that_it_was_started_with(tiny_recipe, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(local_sites, "run_here", lambda *arguments: given.append(arguments) or "its result")
    recipe, watch = tiny_recipe({"runtime.name": "distributed"}), Watch()
    assert run(recipe, tmp_path / "run", overwrite=True, watch=watch) == "its result"
    assert given == [(recipe, tmp_path / "run", False, True, watch)]


def test_without_the_engine_one_sentence_says_what_to_install(tiny_recipe, tmp_path, monkeypatch):
    ours = ("fedloom.experiment.local_sites", "fedloom.experiment.sites", "fedloom.runtimes.sites.flare", "nvflare")
    for name in [n for n in sys.modules if n.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvflare", None)
    with pytest.raises(UserError, match=r"nvflare is not installed: pip install 'fedloom\[distributed\]'"):
        run(tiny_recipe({"runtime.name": "distributed"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
