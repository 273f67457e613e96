"""benchmarks/exactness.py, which runs each exact rule and its controls on real training, holds its own limits."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")


@pytest.fixture
def exactness():
    path = ROOT / "benchmarks" / "exactness.py"
    spec = importlib.util.spec_from_file_location("exactness", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exact_ones_are_and_controls_are_not(exactness, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exactness.py"])
    assert exactness.main() == 0
    lines = dict(line.split("=") for line in capsys.readouterr().out.splitlines())
    for name in exactness.EXACT:
        assert float(lines[f"{name}.float64"]) <= 1e-12 and float(lines[f"{name}.float32"]) <= 1e-6
    assert float(lines["fedit.float32"]) >= 1e-3


def test_it_notices_a_rule_that_is_not_exact(exactness, monkeypatch, capsys):
    monkeypatch.setattr(exactness, "EXACT", ("fedit", "flora"))
    monkeypatch.setattr(sys, "argv", ["exactness.py"])
    assert exactness.main() == 1
    assert "fedit.float64" in capsys.readouterr().err
