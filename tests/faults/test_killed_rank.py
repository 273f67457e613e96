"""A client of two ranks, one of which is killed in the middle of a step: the client fails, and both start again."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest

from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch
from fedloom.messages.types import Assignment, Failure, Update
from fedloom.runtimes.ranks.pool import Ranked

pytestmark = [pytest.mark.faults, pytest.mark.xdist_group("ranks")]


@pytest.mark.parametrize("victim", [1])
def test_a_killed_rank_is_its_clients_failure_and_all_start_again(tiny_recipe, tmp_path, victim):
    setting = prepare(tiny_recipe({"runtime.ranks": 2, "train.eps": 1e-4}), Watch())
    ranked = Ranked(setting.recipe, tmp_path)
    work = Assignment("train", "copy", 1, 1, setting.algorithm.round_payload("copy"), steps=2)
    try:
        first = ranked.handle(work)
        assert isinstance(first, Update)
        old = ranked.pids
        assert len(old) == 2

        def kill():
            time.sleep(0.5)
            os.kill(old[victim], signal.SIGKILL)

        threading.Thread(target=kill).start()
        failure = ranked.handle(replace(work, steps=200_000))  # hours, so it is under way when the rank goes
        assert isinstance(failure, Failure)
        assert (failure.reason, failure.client) == ("crashed", "copy")
        assert failure.detail == f"the trainer ended (rank {victim}: SIGKILL)"
        assert not [p for p in old if psutil.pid_exists(p)]

        again = ranked.handle(work)
        assert isinstance(again, Update)
        assert not set(ranked.pids) & set(old)
        assert again.payload.tensors.keys() == first.payload.tensors.keys()
        assert all((again.payload.tensors[n] == t).all() for n, t in first.payload.tensors.items())
        new = ranked.pids
    finally:
        ranked.close()
    assert not [p for p in new if psutil.pid_exists(p)]
