"""Every benchmark says what it prints, stands in benchmarks/README.md, and parses its arguments."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import sys
import time

import pytest

from fedloom.algorithms.base import Algorithm
from fedloom.federation.rounds.dispatcher import Dispatcher
from tests.helpers import ROOT

FOLDER = ROOT / "benchmarks"
FILES = sorted(FOLDER.glob("*.py"))

#: Those whose own docstring says how they are called; the others are imported by them.
SCRIPTS = [p for p in FILES if f"python benchmarks/{p.name}" in p.read_text(encoding="utf-8").split('"""')[1]]


def page() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_script_has_a_row_and_every_row_a_script():
    rows = re.findall(r"^\| `(\w+\.py)` \|(.*)\|$", page(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == [p.name for p in SCRIPTS]
    for name, row in rows:
        cells = [cell.strip() for cell in row.split(" | ")]
        assert len(cells) == 5 and all(cells), name


def test_what_is_no_script_is_named_as_shared():
    shared = page()[page().index("**What is shared**") : page().index("These are not scripts")]
    named = set(re.findall(r"`(\w+\.py)`", shared))
    helpers = {p.name for p in FILES} - {p.name for p in SCRIPTS}
    assert helpers and helpers <= named


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_parses_help(path, monkeypatch, capsys):
    """In this process, so that torch is imported once and not for each of them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {path.name}")


@pytest.mark.parametrize("place", [(Algorithm, "begin"), (Dispatcher, "assignment")], ids=["turn", "between"])
def test_time_without_a_name_is_not_covered(monkeypatch, tmp_path, tiny_recipe, place):
    """Neither in a client's turn nor between the updates that an aggregation pulls."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spans = importlib.import_module("spans")
    plain = getattr(*place)

    def burning(*arguments, **keywords):
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        return plain(*arguments, **keywords)

    monkeypatch.setattr(*place, burning)
    seconds, cpu, _ = spans.profiled(tiny_recipe({"federation.rounds": 1, "evaluation.every": 1}), tmp_path / "run")
    unnamed = cpu - sum(seconds[name] for name in spans.NAMES)
    assert "rest" not in spans.NAMES
    assert unnamed > 0.59  # three clients train and are measured
    assert min(seconds[name] for name in ("aggregate", "evaluate", "setup", "forward")) > 0


def test_the_makefile_runs_scripts_that_the_page_names():
    makefile = (FOLDER.parent / "Makefile").read_text(encoding="utf-8")
    target = makefile[makefile.index("\nbench:") :].split("\n\n")[0]
    run = re.findall(r"benchmarks/(\w+\.py[^\n]*)", target)
    told = page()[page().index("## make bench") :]
    assert len(run) >= 5
    for command in run:
        assert f"`{command.strip()}`" in told, command
