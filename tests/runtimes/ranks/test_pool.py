"""Ranks as processes: a simulator's clients trained by two of them equal one process's, for DDP and for FSDP.

One pair of processes serves this file; each run tells it its own recipe. tests/training/test_parallel.py has every
algorithm, tests/faults/test_killed_rank.py kills.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedloom.common.errors import UserError
from fedloom.experiment.run import run
from fedloom.federation.checks import check_recipe
from fedloom.federation.watch import Watch
from fedloom.runtimes import simulator
from fedloom.runtimes.ranks.pool import Ranked, RankFailed
from fedloom.runtimes.ranks.worker import ERROR, NO_MEMORY, Worker, WorkerLost
from tests.helpers.preferences import write_pairs

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(autouse=True)
def _quick(loading_once, no_waiting, no_reports):
    pass


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Two processes that are kept from run to run."""
    log = tmp_path_factory.mktemp("ranks") / "log"
    worker = Worker([sys.executable, "-m", "fedloom.runtimes.ranks.main"], log, 1 << 40, 2)
    yield worker
    pids = worker.pids
    worker.close()
    assert not [p for p in pids if psutil.pid_exists(p)]


@pytest.fixture
def kept(processes, monkeypatch):
    """`Ranked` with those processes, in place of its own."""

    class Kept(Ranked):
        def _started(self):
            return processes

        def close(self):
            self._worker = None

    monkeypatch.setattr(simulator, "Ranked", Kept)
    return processes


#: 8, 15 and 22 examples in steps of five: each client's last step is uneven, one of them is of a single example.
ONE_PASS = {
    "train.epochs": 1, "train.batch_size": 5, "train.lr": 1e-2, "train.eps": 1e-4, "evaluation.every": 0,
    "federation.rounds": 2, "train.optimizer_state": "keep",
}  # fmt: skip
DDP, FSDP = {"runtime.ranks": 2}, {"runtime.ranks": 2, "runtime.parallel": "fsdp"}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    files = [f for f in sorted((folder / "adapter").glob("*.safetensors")) if f.name != "adapter_model.safetensors"]
    return load_file((files or [folder / "adapter" / "adapter_model.safetensors"])[0])


def apart(one: Path, other: Path) -> float:
    a, b = adapter(one), adapter(other)
    assert sorted(a) == sorted(b)
    return max(float((a[n] - b[n]).abs().max()) for n in a)


METHODS = {
    "lora": {"method": "lora", "rank": 2, "alpha": 4},
    "full": {"method": "full"},
    "prompt": {"method": "prompt_tuning", "virtual_tokens": 3},
    "ia3": {"method": "ia3"},
}


@pytest.mark.parametrize(
    ("method", "parallel"),
    [("lora", DDP), ("lora", FSDP), ("full", DDP), ("prompt", FSDP), ("ia3", FSDP)],
    ids=["lora ddp", "lora fsdp", "full ddp", "prompt fsdp", "ia3 fsdp"],
)
def test_two_ranks_make_one_processs_adapter(kept, tiny_recipe, tmp_path, method, parallel):
    """DESIGN.md 9b: each loss within 1e-5, the adapter within 1e-5 under AdamW with ε = 1e-4."""
    values = ONE_PASS | {"adapter": METHODS[method]}
    pair = tmp_path / "pair", tmp_path / "one"
    two = run(tiny_recipe(values | parallel), pair[0]).summary
    one = run(tiny_recipe(values), pair[1]).summary
    assert apart(*pair) <= 1e-5
    losses = [
        [
            e["loss"]
            for e in map(json.loads, (p / "events.jsonl").read_text().splitlines())
            if e["event"] == "client_update"
        ]
        for p in pair
    ]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0)
    for when in ("before", "after"):
        assert two["loss"][when] == pytest.approx(one["loss"][when], abs=1e-5)
    assert one["loss"]["after"] < one["loss"]["before"] - 0.01
    assert two["cost"]["steps"] == one["cost"]["steps"]
    assert two["failures"] == 0


def test_preferences_with_a_sharded_base(kept, tiny_recipe, tmp_path):
    """The reference is the base itself, which is in two halves here; a rank without a pair goes along."""
    data = write_pairs(tmp_path / "pairs.jsonl", 24)
    values = ONE_PASS | {"train.objective": "dpo", "data.path": str(data), "federation.rounds": 1}
    for name, parallel in (("pair", FSDP), ("one", {})):
        run(tiny_recipe(values | parallel), tmp_path / name)
    assert apart(tmp_path / "pair", tmp_path / "one") <= 1e-5


class Interrupted(Exception):
    pass


def test_a_resumed_run_of_ranks_equals_an_undisturbed_one(kept, tiny_recipe, tmp_path):
    """With dropout, whose masks are each rank's own, and state that stays with clients: bit for bit."""
    recipe = tiny_recipe(ONE_PASS | DDP | {"algorithm": "scaffold", "adapter.dropout": 0.1})

    def interrupt(event):
        if event["event"] == "round_started" and event["round"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "resumed", watch=Watch(event=interrupt))
    resumed = run(recipe, tmp_path / "resumed", resume=True).summary
    whole = run(recipe, tmp_path / "whole").summary
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    plain = run(recipe.with_values({"adapter.dropout": 0.0}), tmp_path / "plain").summary
    assert plain["adapter_sha256"] != whole["adapter_sha256"], "dropout did something"


def test_a_recipe_that_the_ranks_cannot_open_is_a_sentence(kept, tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(DDP).with_values({"data.path": str(tmp_path / "gone.jsonl")})
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        Ranked._start(simulator.Ranked(recipe, tmp_path))


# ------------------------------------------------------------------ processes, without a model

SCRIPT = """
import fcntl, json, os, signal, socket, struct, sys, time
life = open(sys.argv[0] + ".life", "a")
if sys.argv[2] == "1": fcntl.flock(life, fcntl.LOCK_EX)  # the kernel lets go of it when rank 1 has ended
line = socket.socket(socket.AF_UNIX); line.connect(sys.argv[1])
rank, count, meeting = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def exactly(n):
    data = b""
    while len(data) < n:
        more = line.recv(n - len(data))
        if not more: sys.exit(0)
        data += more
    return data
while True:
    head, size = struct.unpack("<IQ", exactly(12))
    kind, body = json.loads(exactly(head))["kind"], exactly(size)
    if kind == "kill" and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory" and rank == 1: os._exit(12)
    if kind == "error" and rank == 1: os._exit(70)
    if kind in {"kill", "memory", "error"}:
        if rank == 2: time.sleep(60)
        fcntl.flock(life, fcntl.LOCK_EX); time.sleep(0.05); os._exit(70)
    if kind == "hang": time.sleep(60)
    text = json.dumps({"state": "done", "heard": rank, "of": count}).encode()
    if rank == 0: line.sendall(struct.pack("<IQ", len(text), len(body)) + text + body)
"""


@pytest.fixture
def three(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    worker = Worker([sys.executable, "-S", str(script)], tmp_path / "log", 1 << 20, 3)
    yield worker
    worker.close()
    assert not [p for p in worker.pids if psutil.pid_exists(p)]
    assert not worker._folder.exists()


def test_every_rank_hears_and_the_first_one_speaks(three):
    assert three.ask({"kind": "echo"}, b"x") == ({"state": "done", "heard": 0, "of": 3}, b"x")
    assert three.ask({"kind": "echo"}, b"yz") == ({"state": "done", "heard": 0, "of": 3}, b"yz")


@pytest.mark.parametrize(
    ("kind", "how", "error"),
    [("kill", "rank 1: SIGKILL", False), ("memory", "rank 1: out of memory", False), ("error", "exit code 70", True)],
)
def test_one_rank_that_ends_ends_all_and_is_named(three, kind, how, error):
    """The others end by an error of their own, which follows from it and is not what is said."""
    assert (NO_MEMORY, ERROR) == (12, 70)
    with pytest.raises(WorkerLost, match=how) as lost:
        three.ask({"kind": kind}, b"")
    assert lost.value.error is error
    assert not [p for p in three.pids if psutil.pid_exists(p)]


def test_ranks_end_when_whoever_asks_is_gone(three):
    for connection in three._connections:
        connection.close()
    until = time.monotonic() + 20
    while any(p.poll() is None for p in three._processes) and time.monotonic() < until:
        time.sleep(0.02)
    assert [p.poll() for p in three._processes] == [0, 0, 0]


def test_an_error_of_the_trainers_own_is_an_error_here(tiny_recipe, tmp_path, three, monkeypatch):
    from fedloom.messages.types import Assignment, Payload

    ranked = Ranked(tiny_recipe(DDP), tmp_path)
    ranked._worker = three
    (tmp_path / "ranks.log").write_text("Traceback\nKeyError: 'w'\n")
    ask = three.ask
    monkeypatch.setattr(three, "ask", lambda header, body: ask({"kind": "error"}, b""))
    with pytest.raises(RankFailed, match="KeyError: 'w'"):
        ranked.handle(Assignment("train", "copy", 1, 1, Payload()))


# ------------------------------------------------------------------ GPUs, as far as that can be said without one


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"runtime.device": "cuda"}, "torch sees 1 GPUs"),
        ({"runtime.device": "cuda:0"}, "runtime.device=cuda:0 is one GPU"),
    ],
)
def test_each_rank_needs_a_gpu_of_its_own(tiny_recipe, monkeypatch, runtime, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=words):
        check_recipe(tiny_recipe(DDP | runtime))
    check_recipe(tiny_recipe(runtime))
