"""check_algorithm: passes what is right, leaves nothing behind, and works without pytest."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.testing import Report, check_algorithm
from fedloom.testing.contract import CHECKS
from tests.helpers import ROOT
from tests.helpers.broken import Momentum


def test_a_class_that_keeps_the_contract_passes_and_leaves_nothing_behind():
    names, home, state = registry.algorithms.names(), os.environ["FEDLOOM_HOME"], torch.get_rng_state()
    report = check_algorithm(Momentum)
    assert isinstance(report, Report)
    assert (report.algorithm, report.sentences, set(report.problems)) == ("Momentum", [], set(CHECKS))
    assert str(report).startswith("Momentum: 15 checks, 0 problems, ")
    assert registry.algorithms.names() == names
    assert os.environ["FEDLOOM_HOME"] == home
    assert torch.equal(torch.get_rng_state(), state)


def test_a_class_that_is_no_algorithm_is_refused_and_forgotten():
    with pytest.raises(UserError, match="is the class int, not a subclass of Algorithm"):
        check_algorithm(int)
    assert "checked-int" not in registry.algorithms


def test_it_works_in_a_plain_script(tmp_path):
    script = tmp_path / "check.py"
    script.write_text(
        "from fedloom.algorithms import FedAvg\nfrom fedloom.testing import check_algorithm\n"
        "print(check_algorithm(FedAvg, only=['words', 'layout', 'order']))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "FEDLOOM_HOME"} | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FedAvg: 3 checks, 0 problems, ")
    assert [p.name for p in tmp_path.iterdir()] == ["check.py"]
