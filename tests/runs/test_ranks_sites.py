"""A run between sites one of which trains with two processes: the simulator's adapter, up to rounding.

The site's agent, its setting and its trainer's processes are the real ones; the other two sites are functions in this process.
tests/runtimes/ranks/test_pool.py has the simulator's ranks and every method, tests/runtimes/sites/test_trainer.py who decides how many there are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from fedloom.common.yaml import dump_yaml
from fedloom.experiment.run import run
from fedloom.federation.record.events import read_events
from fedloom.runtimes.ranks.worker import Worker
from fedloom.runtimes.sites.project import SiteConfig
from tests.helpers.sites import between_sites

pytest.importorskip("nvflare")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")]

#: As in test_ranks.py: steps of five of 8, 15 or 22 examples, so that the last one is shared out unevenly.
VALUES = {
    "train.epochs": 1, "train.batch_size": 5, "train.lr": 1e-2, "train.eps": 1e-4, "federation.rounds": 2,
    "train.optimizer_state": "keep",
}  # fmt: skip


def losses(folder: Path) -> list[float]:
    events = read_events(folder / "events.jsonl")
    return [e["loss"] for e in events if e["event"] == "client_update"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_site_of_two_ranks_makes_the_simulators_adapter(tiny_recipe, dealt, tmp_path, parallel):
    """DESIGN.md 9b: each loss within 1e-5, the adapter within 1e-5 under AdamW with ε = 1e-4."""
    recipe = tiny_recipe(VALUES)
    simulated = run(recipe, tmp_path / "simulated").summary
    files, home = dealt(recipe), tmp_path / "sites" / "last"
    home.mkdir(parents=True)
    own = SiteConfig(
        client="last", home=str(home), policy="none", data=str(files["last"]), threads=2, ranks=2, parallel=parallel
    )
    (home / "site.yaml").write_text(dump_yaml(own.model_dump(mode="json")))
    command = ["env", f"FEDLOOM_SITE={home / 'site.yaml'}", sys.executable, "-m", "fedloom.runtimes.sites.trainer"]
    started: list[Worker] = []

    def start(given):
        assert given["runtime"]["ranks"] == 1, "the number is the site's own"
        started.append(Worker(command, home / "trainer.log", 1 << 30, own.ranks or 1))
        return started[-1]

    found = between_sites(recipe, files, tmp_path / "sites", processes={"last": start}).summary
    assert found["failures"] == 0
    assert "train of round 1: done" in (home / "trainer.log").read_text()
    assert [len(worker.pids) for worker in started] == [2], "the same two, from the first round to the last"
    assert not [p for worker in started for p in worker.pids if psutil.pid_exists(p)]

    folders = tmp_path / "simulated", tmp_path / "sites" / "run"
    one, two = (load_file(f / "adapter" / "adapter_model.safetensors") for f in folders)
    assert sorted(one) == sorted(two)
    assert max(float((one[n] - two[n]).abs().max()) for n in one) <= 1e-5
    assert found["adapter_sha256"] != simulated["adapter_sha256"], "two ranks round otherwise: it was they who trained"
    told = [losses(folder) for folder in folders]
    assert len(told[0]) == 6
    assert told[0] == pytest.approx(told[1], abs=1e-5, rel=0)
    for when in ("before", "after"):
        assert found["loss"][when] == pytest.approx(simulated["loss"][when], abs=1e-5)
    assert found["loss"]["after"] < found["loss"]["before"] - 0.01
    assert found["cost"]["steps"] == simulated["cost"]["steps"]
