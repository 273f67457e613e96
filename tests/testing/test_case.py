from __future__ import annotations

from fedloom.algorithms import FedAvg
from fedloom.testing import tiny
from fedloom.testing.case import Case


def test_a_killed_run_has_no_bits_and_its_folder_can_be_resumed(tmp_path):
    case = Case(FedAvg, "fedavg", tiny.recipe(tmp_path, {"federation.rounds": 2}), tmp_path / "runs")
    killed = case.run(kill=("train", 2, 1))
    assert killed.bits == {}
    assert len(killed.log.states) == 1
    resumed = case.run(resume=killed.folder)
    assert resumed.bits == case.whole.bits
    assert case.whole.bits["adapter"]
    assert [len(u) for u in case.whole.log.updates] == [3, 3]
    assert {r for _, r in case.whole.log.up} == {1, 2}
    assert case.sizes(2).clients == 3
