"""The Ray runtime: the simulator's result bit for bit, whatever actor does what, dies or hangs.

One Ray and two actors serve all runs here (an actor costs five seconds of imports); those that die are replaced as ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

import fedloom
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.federation.record.events import read_events
from fedloom.federation.watch import Watch
from fedloom.messages.operators.flat import raw_bytes
from fedloom.messages.types import Failure
from fedloom.runtimes.simulator import Simulator
from tests.helpers import ROOT

psutil = pytest.importorskip("psutil")
ray = pytest.importorskip("ray")

from fedloom.recipe.recipe import RayConfig  # noqa: E402
from fedloom.runtimes import ray as runtime  # noqa: E402
from tests.helpers.ray_host import Faulty  # noqa: E402

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray of two CPUs, and the folder that `Faulty` looks into."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLOOM_TEST_FAULTS", str(folder))
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # where actors find Faulty
        own = runtime._start(RayConfig())
        yield folder
        assert own.folder
        assert own.folder.is_dir()
        own.close()
        assert not ray.is_initialized()


@pytest.fixture(scope="module")
def spare() -> list:
    """Actors that wait for the next run."""
    return []


@pytest.fixture
def made(faults, spare, monkeypatch) -> list[runtime.Ray]:
    """The runtimes that a test's runs make, on actors that are there already where there are any."""
    kept: list[runtime.Ray] = []
    begin, process = runtime.Ray.__init__, runtime.Ray._process

    def remembered(self, *args):
        kept.append(self)
        begin(self, *args)

    monkeypatch.setattr(runtime.Ray, "__init__", remembered)
    monkeypatch.setattr(runtime, "Host", Faulty)
    monkeypatch.setattr(runtime.Ray, "_process", lambda self: spare.pop() if spare else process(self))
    monkeypatch.setattr(runtime.Ray, "_let_go", lambda self, actor: spare.append(actor.handle))
    return kept


def events(folder: Path) -> list[dict]:
    """What both runtimes have to tell alike: times and what holds times (an update's length) left out."""
    left_out = {"time", "seconds", "upload_bytes", "download_bytes", "path"}
    return [{k: v for k, v in e.items() if k not in left_out} for e in read_events(folder / "events.jsonl")]


def files(folder: Path) -> dict[str, dict[str, bytes]]:
    """Clients' own state and adapters, tensor by tensor (safetensors writes its metadata in any order)."""
    found = [p for name in ("clients", "adapters", "adapter") for p in (folder / name).rglob("*.safetensors")]
    return {
        p.relative_to(folder).as_posix(): {n: raw_bytes(t).tobytes() for n, t in load_file(p).items()} for p in found
    }


def bytes_sent(folder: Path) -> list[int]:
    """Down to each client; the first message is left out, since it has the recipe and so the runtime's name."""
    told = [e for e in read_events(folder / "events.jsonl") if e["event"] == "client_update" and e["round"] > 1]
    return [e["download_bytes"] for e in told]


#: One case has what another may get wrong: state, operators with state, ranks, arrival in virtual time, files of clients.
CASES = {
    "operators": {
        "algorithm": "fedavg",
        "operators": {"down": ["bf16"], "up": ["delta", {"name": "quantize", "bits": 4, "error_feedback": True}]},
        "train.optimizer_state": "keep", "adapter.dropout": 0.1, "federation.clients_per_round": 2,
    },
    "scaffold": {"algorithm": "scaffold", "train.optimizer": "sgd", "train.momentum": 0.0},
    "mixed ranks": {"algorithm": "flexlora", "adapter.ranks": {"copy": 1, "last": 2, "upper": 2}},
    "fedbuff": {"algorithm": {"name": "fedbuff", "buffer": 2}, "federation.rounds": 3},
    "personal": {"algorithm": "ditto"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_simulators_result_bit_for_bit(case, made, tiny_recipe, tmp_path):
    recipe = tiny_recipe(CASES[case])
    one = fedloom.run(recipe, out=tmp_path / "simulator")
    two = fedloom.run(recipe.with_values({"runtime.name": "ray"}), out=tmp_path / "ray")
    assert two.summary["adapter_sha256"] == one.summary["adapter_sha256"]
    for key in ("loss", "clients", "failures"):
        assert two.summary[key] == one.summary[key], key
    assert two.summary["cost"]["steps"] == one.summary["cost"]["steps"]
    assert [e for e in events(two.folder) if e["event"] != "evaluation"] == [
        e for e in events(one.folder) if e["event"] != "evaluation"
    ]
    assert files(two.folder) == files(one.folder)
    assert bytes_sent(two.folder) == bytes_sent(one.folder)
    assert {actor.number for actor in made[0]._actors} == set(), "closed"
    if case == "scaffold":  # 15 assignments: three evaluations of three clients, two rounds of three
        assert made[0].puts == 3, "an evaluation and the round after it send one payload, which is put once"


class Failing(Simulator):
    """A simulator in which the same clients fail in the same rounds."""

    faults: dict[tuple[int, str], str] = {}  # noqa: RUF012

    def run(self, assignments):
        for assignment in assignments:
            if assignment is None:
                return
            reason = self.faults.get((assignment.round, assignment.client)) if assignment.kind == "train" else None
            if reason:
                yield Failure(assignment.client, assignment.round, reason, "as asked")
            else:
                yield from super().run([assignment])


def test_a_killed_and_a_hung_actor_cost_one_update_each_and_are_replaced(
    made, faults, tiny_recipe, tmp_path, monkeypatch
):
    recipe = tiny_recipe({"algorithm": "scaffold", "federation.rounds": 4, "federation.round_deadline": 10.0})
    monkeypatch.setattr(Failing, "faults", {(2, "last"): "crashed", (3, "upper"): "late"})
    monkeypatch.setitem(registry.runtimes._targets, "failing", Failing)
    one = fedloom.run(recipe.with_values({"runtime.name": "failing"}), out=tmp_path / "simulator")
    (faults / "2-last").write_text("die")
    (faults / "3-upper").write_text("hang")
    two = fedloom.run(recipe.with_values({"runtime.name": "ray"}), out=tmp_path / "ray")
    failed = [e for e in read_events(two.folder / "events.jsonl") if e["event"] == "client_failed"]
    assert [(e["round"], e["client"], e["reason"]) for e in failed] == [(2, "last", "crashed"), (3, "upper", "late")]
    updates = [(e["round"], e["client"]) for e in events(two.folder) if e["event"] == "client_update"]
    assert {(3, "last"), (4, "upper"), (4, "last")} <= set(updates), "back in the next round"
    assert len(updates) == 4 * 3 - 2
    assert two.summary["adapter_sha256"] == one.summary["adapter_sha256"]
    assert files(two.folder) == files(one.folder)


def test_an_interrupted_run_goes_on_to_the_same_bits_in_either_runtime(made, tiny_recipe, tmp_path):
    recipe = tiny_recipe({"algorithm": "scaffold", "train.optimizer_state": "keep", "federation.rounds": 3})
    undisturbed = fedloom.run(recipe, out=tmp_path / "undisturbed").summary["adapter_sha256"]
    here = recipe.with_values({"runtime.name": "ray"})

    def interrupt(event):
        if event["event"] == "client_update" and event["round"] == 2 and event["client"] == "last":
            raise KeyboardInterrupt

    for number, goes_on in enumerate((here, recipe)):
        with pytest.raises(KeyboardInterrupt):
            fedloom.run(here, out=tmp_path / str(number), watch=Watch(event=interrupt))
        made[-1].close()
        done = fedloom.run(goes_on, out=tmp_path / str(number), resume=True)
        assert done.summary["adapter_sha256"] == undisturbed
        assert done.summary["failures"] == 0
    assert len(made) == 3, "the second was carried on by the simulator"


def test_nothing_listens_beyond_this_machine(faults):
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
    folder = str(runtime.ray._private.worker._global_node._ray_params.temp_dir)
    ours = [p for p in psutil.process_iter(["cmdline", "pid"]) if any(folder in a for a in p.info["cmdline"] or [])]
    assert len(ours) >= 3, "gcs, raylet and their helpers"
    heard = {c.laddr.ip for p in ours for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert heard <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"runtime.ray.actors": 3}, "need 3 CPUs together, but Ray has 2"),
        ({"runtime.ray.gpus": 0.5}, "need 1 GPUs together, but Ray has 0"),
        ({"algorithm": "fedot"}, "use runtime.name=simulator"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(values, words, faults, tiny_recipe, tmp_path):
    with pytest.raises(UserError, match=words):
        fedloom.run(tiny_recipe({**values, "runtime.name": "ray"}), out=tmp_path / "run")


def test_without_ray_one_sentence_says_what_to_install(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "fedloom.runtimes.ray")
    monkeypatch.setitem(registry.runtimes._targets, "ray", "fedloom.runtimes.ray:Ray")
    with pytest.raises(UserError, match=r"pip install 'fedloom\[ray\]'"):
        fedloom.run(tiny_recipe({"runtime.name": "ray"}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
