"""The personal and the low-traffic algorithms through whole runs: two rounds, and a run killed in the second and resumed."""

from __future__ import annotations

import pytest

from fedloom.common import registry
from fedloom.experiment.run import run
from fedloom.federation.record.events import read_events
from fedloom.federation.watch import Watch

pytestmark = pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")

PERSONAL = ("pfedme", "ditto", "fedper", "fedrep", "feddpa")
LOW_TRAFFIC = ("fedkseed", "fedmezo", "decomfl", "ferret")
KEEP = {
    "train.optimizer_state": "keep",
    "adapter.dropout": 0.1,
    "federation.rounds": 3,
    "federation.clients_per_round": 2,
}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_in_round(number):
    def tick(what, round, done, total):
        if what == "train" and round == number and done == 1:
            raise Killed

    return Watch(tick=tick)


@pytest.mark.parametrize("name", PERSONAL + LOW_TRAFFIC)
def test_two_rounds(tiny_recipe, tmp_path, name):
    result = run(tiny_recipe({"algorithm.name": name}), tmp_path / "run")
    assert result.summary["rounds"] == 2 and result.summary["failures"] == 0
    personal = registry.algorithms.get(name).properties.personal
    assert personal == (name in PERSONAL)
    assert (tmp_path / "run" / "adapters").is_dir() == personal
    losses = [e["loss"] for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "evaluation"]
    assert losses[-1] != losses[0]
    if name in ("fedkseed", "decomfl"):
        told = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "client_update"]
        assert max(max(e["upload_bytes"], e["download_bytes"]) for e in told) < 20_000


@pytest.mark.parametrize("name", PERSONAL + LOW_TRAFFIC)
def test_killed_in_the_third_round_and_resumed(tiny_recipe, tmp_path, name):
    """Two clients of three in a round, kept moments, dropout: the resumed run ends with the undisturbed one's bits."""
    light = {"algorithm.bases": 256} if name == "ferret" else {}
    recipe = tiny_recipe({"algorithm.name": name, **light, **KEEP})
    whole = run(recipe, tmp_path / "whole").summary
    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", watch=kill_in_round(3))
    resumed = run(recipe, tmp_path / "killed", resume=True).summary
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["loss"] == whole["loss"]
    assert resumed["per_client"] == whole["per_client"]
