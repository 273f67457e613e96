"""A real federation on loopback (server, three sites, mutual TLS), and what becomes of a run when a part of it is killed.

Processes are killed by their number, at a moment that the run's own events give. One server's kit and three sites' kits
serve all tests; the sites stay joined from test to test, as they do in life. Minutes: run by `make test-faults`.
"""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedloom.experiment.run import run
from fedloom.federation.record.events import read_events
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.sites.project import Project
from tests.helpers import tiny

pytest.importorskip("nvflare")
pytestmark = [pytest.mark.faults, pytest.mark.xdist_group("federation")]

SITES = {"site-a": "copy", "site-b": "last", "site-c": "upper"}
PATIENCE = 400.0


def fedloom(*args: Any, log: Path) -> subprocess.Popen[bytes]:
    """The real command in a process of its own."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "fedloom", *[str(a) for a in args]],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (a shell's background job ignores it)
            start_new_session=True,  # a session has its own share of a busy machine
        )


def waited(what: str, condition: Callable[[], Any], patience: float = PATIENCE, log: Path | None = None) -> Any:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {patience:g} s\n{log.read_text() if log else ''}")


def children(pid: int, module: str) -> list[psutil.Process]:
    """Processes below `pid` that run a module."""
    try:
        below = psutil.Process(pid).children(recursive=True)
        return [p for p in below if module in " ".join(p.cmdline())]
    except psutil.Error:
        return []


@dataclass
class Federation:
    """Three sites that have joined, and runs that one after another are served to them."""

    folder: Path
    recipe: Callable[[Mapping[str, Any]], Recipe]
    joined: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    served: list[Served] = field(default_factory=list)
    count: int = 0

    def join(self, site: str) -> None:
        data = self.folder / "data" / f"{SITES[site]}.jsonl"
        self.joined[site] = fedloom(
            "join", self.folder / "kits" / site, "--data", data, log=self.folder / f"{site}.log"
        )

    def leave(self, site: str) -> None:
        self.joined[site].send_signal(signal.SIGINT)
        assert self.joined[site].wait(timeout=120) == 130

    def site(self, site: str, module: str) -> psutil.Process:
        """A process of a site: its service, its job, or its trainer."""
        return waited(f"{module} of {site}", lambda: children(self.joined[site].pid, module))[0]

    def serve(self, overrides: Mapping[str, Any], *options: str) -> Served:
        self.count += 1
        folder = self.folder / f"run-{self.count}"
        recipe = self.recipe(overrides)
        path = self.folder / f"{self.count}.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        self.served.append(Served(self, path, folder, recipe))
        return self.served[-1].start(*options)

    def close(self) -> None:
        for served in self.served:
            if served.process is not None and served.process.poll() is None:
                served.process.send_signal(signal.SIGINT)
                served.process.wait(timeout=120)
        for process in self.joined.values():
            process.send_signal(signal.SIGINT)
        for process in self.joined.values():
            process.wait(timeout=120)


@dataclass
class Served:
    federation: Federation
    path: Path
    folder: Path
    recipe: Recipe
    process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> Served:
        kit = self.federation.folder / "kits" / "server"
        self.process = fedloom("serve", kit, self.path, "--out", self.folder, *options, log=self.log)
        return self

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [e for e in read_events(path) if e["event"] == kind] if path.exists() else []

    def in_round(self, number: int) -> None:
        """Wait until the round has begun."""
        waited(f"round {number}", lambda: any(e["round"] == number for e in self.events("round_started")), log=self.log)

    def after(self, number: int) -> None:
        waited(
            f"the end of round {number}",
            lambda: any(e["round"] >= number for e in self.events("round_finished")),
            log=self.log,
        )

    def failures(self, client: str) -> list[tuple[int, str]]:
        return [(e["round"], e["reason"]) for e in self.events("client_failed") if e["client"] == client]

    def updates(self, client: str) -> list[int]:
        return [e["round"] for e in self.events("client_update") if e["client"] == client]

    def child(self, module: str) -> psutil.Process:
        assert self.process is not None
        return waited(module, lambda: children(self.process.pid, module))[0]

    def ended(self, code: int = 0) -> None:
        assert self.process is not None
        try:
            found = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the run did not end\n{self.log.read_text()}") from None
        assert found == code, self.log.read_text()

    @property
    def digest(self) -> str:
        return str(json.loads((self.folder / "summary.json").read_text())["adapter_sha256"])


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tiny_data: Path) -> Callable[[Mapping[str, Any]], Recipe]:
    def make(overrides: Mapping[str, Any]) -> Recipe:
        values: dict[str, Any] = {
            "name": "tiny",
            "model": str(tiny_model),
            "data": {"path": str(tiny_data), "max_length": 96, "template": "plain"},
            "split": {"splitter": "meta", "test": 0.2, "validation": 0.05},
            "adapter": {"rank": 2, "alpha": 4},
            "train": {"steps": 60, "batch_size": 2, "lr": 1e-3, "optimizer_state": "keep"},
            "federation": {"rounds": 8},
            "runtime": {"threads": 1, "device": "cpu"},
            "evaluation": {"suite": None, "every": 0},
        }
        return Recipe.parse(values, overrides)

    return make


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, recipe: Callable[[Mapping[str, Any]], Recipe]
) -> Iterator[Federation]:
    from fedloom.experiment.local_sites import deal, free_port
    from fedloom.federation.workplace import find_data
    from fedloom.runtimes.sites.flare.kits import provision

    folder = tmp_path_factory.mktemp("federation")
    project = {
        "name": "tests",
        "server": {"host": "localhost", "port": free_port()},
        "sites": [{"name": site, "client": client} for site, client in SITES.items()],
    }
    provision(Project.model_validate(project), folder / "kits")
    deal(recipe({}), find_data(recipe({})), {c: folder / "data" / f"{c}.jsonl" for c in SITES.values()})
    made = Federation(folder, recipe)
    for site in SITES:
        made.join(site)
    yield made
    made.close()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    assert not left, left


@pytest.fixture(scope="module")
def undisturbed(recipe: Callable[[Mapping[str, Any]], Recipe], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter that the simulator makes of the same recipe."""
    result = run(recipe({}), tmp_path_factory.mktemp("simulated") / "run")
    return str(result.summary["adapter_sha256"])


def test_a_lost_server_goes_on_from_its_checkpoint_to_the_simulators_adapter(federation, undisturbed):
    """The job is killed in round 2, the whole service in round 4, and the command itself in round 6."""
    served = federation.serve({})
    served.in_round(2)
    served.child("runner_process").kill()
    served.in_round(4)
    served.child("server_train").kill()
    served.in_round(6)
    assert served.process is not None
    served.process.kill()
    served.process.wait()
    finished = served.events("round_finished")[-1]["round"]
    served.start("--resume")
    served.ended()
    assert served.events("run_resumed")[-1]["round"] >= finished - 1
    assert [e["round"] for e in served.events("round_finished")] == list(range(1, 9))
    assert all(e["updates"] == 3 for e in served.events("round_finished"))
    assert served.digest == undisturbed


def test_a_trainer_that_is_killed_or_hangs_costs_its_update_and_is_back(federation):
    """SIGKILL in round 2: crashed. SIGSTOP in round 5, past the deadline: late, and the site ends it."""
    served = federation.serve({"federation.rounds": 9, "federation.round_deadline": 20.0, "train.steps": 150})
    served.in_round(2)
    federation.site("site-a", "fedloom.runtimes.sites.trainer").kill()
    served.in_round(5)
    hung = federation.site("site-b", "fedloom.runtimes.sites.trainer")
    hung.send_signal(signal.SIGSTOP)
    served.ended()
    assert [reason for _, reason in served.failures("copy")] == ["crashed"]
    assert [reason for _, reason in served.failures("last")] == ["late"]
    assert served.failures("upper") == []
    for client in ("copy", "last"):
        lost = served.failures(client)[0][0]
        assert served.updates(client) == [n for n in range(1, 10) if n != lost]
    assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE


def test_a_sites_job_that_is_killed_is_started_again_by_the_site(federation):
    served = federation.serve({"federation.rounds": 8})
    served.in_round(2)
    federation.site("site-c", "worker_process").kill()
    served.ended()
    reasons = {reason for _, reason in served.failures("upper")}
    assert reasons and reasons <= {"lost", "absent"}
    assert served.updates("upper")[-1] == 8
    assert {c: served.failures(c) for c in ("copy", "last")} == {"copy": [], "last": []}


def test_a_sites_service_that_is_killed_is_back_in_another_job(federation):
    served = federation.serve({"federation.rounds": 12, "train.steps": 200})
    served.in_round(2)
    federation.site("site-a", "client_train").kill()
    served.ended()
    reasons = {reason for _, reason in served.failures("copy")}
    assert reasons and reasons <= {"lost", "absent"}
    assert served.updates("copy")[-1] == 12
    assert served.events("run_resumed"), "the site came back in another job"


def test_below_quorum_the_run_waits_until_its_deadline_and_keeps_its_rounds(federation):
    """A trainer that was killed is asked again and saves its round; one that hangs does not, and the run ends with 1."""
    served = federation.serve({"federation.min_clients": 3, "federation.rounds": 9, "federation.round_deadline": 30.0})
    served.in_round(2)
    federation.site("site-a", "fedloom.runtimes.sites.trainer").kill()
    served.in_round(5)
    federation.site("site-b", "fedloom.runtimes.sites.trainer").send_signal(signal.SIGSTOP)
    served.ended(1)
    last = served.events("round_started")[-1]
    lost = next(e for e in served.events("client_failed") if e["client"] == "last")
    assert lost["round"] == last["round"]
    assert lost["time"] - last["time"] >= 29.9  # by the server's clock
    assert "federation.min_clients" in served.log.read_text().splitlines()[-1]
    assert [reason for _, reason in served.failures("copy")] == ["crashed"]
    finished = served.events("round_finished")
    assert [e["round"] for e in finished] == list(range(1, len(finished) + 1))
    assert len(finished) >= 4
    assert all(e["updates"] == 3 for e in finished)
    assert f"{len(finished)} finished rounds are kept" in served.log.read_text()


def test_without_our_certificate_nobody_gets_an_answer(federation, tmp_path):
    """A kit of another authority for the same address, and a connection without a certificate, while a round goes on."""
    from fedloom.runtimes.sites.flare.kits import provision

    served = federation.serve({"federation.rounds": 4})
    served.in_round(1)
    held = federation.site("site-a", "fedloom.runtimes.sites.trainer")
    held.send_signal(signal.SIGSTOP)  # the round lasts until we have looked
    try:
        port = Project.load(_project(federation.folder / "kits" / "server", tmp_path)).server.port
        foreign = {"name": "tests", "server": {"host": "localhost", "port": port}, "sites": ["site-a"]}
        provision(Project.model_validate(foreign), tmp_path / "kits")
        rows = tiny.write_rows(tmp_path / "rows.jsonl")
        check = fedloom("join", tmp_path / "kits" / "site-a", "--data", rows, "--check", log=tmp_path / "check.log")
        assert check.wait(timeout=120) == 1
        assert "mutual TLS" in (tmp_path / "check.log").read_text()
        log = tmp_path / "join.log"
        stranger = fedloom("join", tmp_path / "kits" / "site-a", "--data", rows, log=log)
        try:
            waited("a sentence", lambda: "ask for a new kit" in log.read_text(), log=log)
        finally:
            stranger.send_signal(signal.SIGINT)
            stranger.wait(timeout=120)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            _answer_without_certificate(federation.folder / "kits" / "site-a", port)
    finally:
        held.send_signal(signal.SIGCONT)
    served.ended()
    assert all(e["updates"] == 3 for e in served.events("round_finished"))


def test_a_revoked_site_stays_out_and_the_others_go_on(federation):
    """Its certificate is as good as before; the project says that it is no longer let in, and then that it is again."""
    from fedloom.runtimes.sites.flare.kits import provision

    kits = federation.folder / "kits"
    before = Project.load(_project(kits / "server", federation.folder))
    provision(before.model_copy(update={"revoked": ["site-b"]}), kits)
    served = federation.serve({"federation.rounds": 3, "train.steps": 200})
    served.in_round(1)
    held = federation.site("site-a", "fedloom.runtimes.sites.trainer")
    held.send_signal(signal.SIGSTOP)  # the round lasts until the site was refused
    own = federation.folder / "site-b.log"
    try:
        waited("a sentence at the site", lambda: "whether it was revoked" in own.read_text(), log=own)
    finally:
        held.send_signal(signal.SIGCONT)
    served.ended()
    log = served.log.read_text()
    assert "site-a is connected" in log
    assert "site-b is connected" not in log
    assert all(e["updates"] == 2 for e in served.events("round_finished"))
    assert {e["client"] for e in served.events("client_update")} == {"copy", "upper"}

    provision(before, kits)
    federation.leave("site-b")
    federation.join("site-b")  # at once, and not at its next try
    served = federation.serve({"federation.rounds": 1, "train.steps": 2})
    served.ended()
    assert [e["updates"] for e in served.events("round_finished")] == [3]


def _project(kit: Path, folder: Path) -> Path:
    from fedloom.common.yaml import dump_yaml, load_yaml

    path = folder / "project.yaml"
    path.write_text(dump_yaml(load_yaml((kit / "kit.yaml").read_text())["project"]))
    return path


def _answer_without_certificate(kit: Path, port: int) -> bytes:
    context = ssl.create_default_context(cafile=kit / "startup" / "rootCA.pem")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", port), 60) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as line,
    ):
        line.settimeout(60)
        line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        answer = line.recv(100)
        if not answer:
            raise ConnectionError("closed without a word")
        return answer


def test_what_a_site_sends_is_in_its_audit_log_and_holds_no_text(federation):
    """Runs last: every answer of all these runs is a line with size and digest, and none holds a word of the data."""
    for site, client in SITES.items():
        home = federation.folder / "kits" / site / "home"
        lines = [json.loads(line) for line in (home / "audit.jsonl").read_text().splitlines()]
        assert len(lines) > 100
        assert all(set(line) == {"time", "what", "bytes", "sha256"} and len(line["sha256"]) == 64 for line in lines)
        texts = {
            json.loads(line).get("output")
            for line in (federation.folder / "data" / f"{client}.jsonl").read_text().splitlines()
        }
        audit = (home / "audit.jsonl").read_text()
        assert not [t for t in texts if t and len(t) > 8 and t in audit]
    server = "".join(p.read_text(errors="replace") for p in (federation.folder / "kits" / "server").glob("*.log"))
    assert "trainer.log" not in server
    assert (federation.folder / "kits" / "server" / "service.log").exists()
