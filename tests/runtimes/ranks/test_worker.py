"""The trainer's process and its socket: frames, a process that dies, hangs or is called off, and nothing left behind."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from fedloom.runtimes.ranks.worker import MAX_HEADER, Stopped, Worker, WorkerLate, WorkerLost, command, receive, send
from tests.helpers import ROOT

# A trainer without torch: echoes, sleeps, kills itself or sends too much, as it is asked.
SCRIPT = """
import os, signal, socket, struct, sys, time, json
line = socket.socket(socket.AF_UNIX); line.connect(sys.argv[-1])
def exactly(n):
    data = b""
    while len(data) < n:
        more = line.recv(n - len(data))
        if not more: sys.exit(0)
        data += more
    return data
while True:
    head, size = struct.unpack("<IQ", exactly(12))
    header, body = json.loads(exactly(head)), exactly(size)
    if header["kind"] == "die": os.kill(os.getpid(), signal.SIGKILL)
    if header["kind"] == "leave": sys.exit(3)
    if header["kind"] == "sleep": time.sleep(60)
    if header["kind"] == "much": body = None
    text = json.dumps({"state": "done"}).encode()
    if body is None: line.sendall(struct.pack("<IQ", len(text), 1 << 50) + text); time.sleep(60)
    line.sendall(struct.pack("<IQ", len(text), len(body)) + text + body)
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(SCRIPT)
    made = Worker([sys.executable, "-S", str(script)], tmp_path / "log", 1 << 24)
    yield made
    made.close()
    assert not made.alive
    assert not made._folder.exists()


def test_one_answer_after_another_from_one_process(worker):
    pid = worker.pid
    for body in (b"", b"x", bytes(range(256)) * 40_000):
        assert worker.ask({"kind": "echo"}, body) == ({"state": "done"}, body)
    assert worker.pid == pid


@pytest.mark.parametrize(("kind", "how"), [("die", "SIGKILL"), ("leave", "exit code 3")])
def test_a_process_that_ends_is_said_with_how(worker, kind, how):
    with pytest.raises(WorkerLost, match=how):
        worker.ask({"kind": kind}, b"")


def test_an_answer_over_the_limit_is_no_answer(worker):
    began = time.monotonic()
    with pytest.raises(WorkerLost):
        worker.ask({"kind": "much"}, b"")
    assert time.monotonic() - began < 20


def test_a_process_that_is_late_or_called_off_is_ended(tmp_path, worker):
    with pytest.raises(WorkerLate):
        worker.ask({"kind": "sleep"}, b"", deadline=0.3)
    assert not worker.alive
    other = Worker([sys.executable, "-S", str(tmp_path / "trainer.py")], tmp_path / "log", 1 << 20)
    with pytest.raises(Stopped):
        other.ask({"kind": "sleep"}, b"", stopped=lambda: True)
    assert not other.alive


def test_a_command_that_cannot_start_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(WorkerLost, match="exit code"):
        Worker([sys.executable, "-c", "import sys; sys.exit(7)"], tmp_path / "log", 1)


def test_a_frame_is_bounded_before_it_is_read():
    here, there = socket.socketpair()
    with here, there:
        send(here, {"a": 1}, b"12345")
        with pytest.raises(ValueError, match="at most"):
            receive(there, 4)
        with pytest.raises(ValueError, match="header"):
            send(here, {"a": "x" * MAX_HEADER}, b"")
    here, there = socket.socketpair()
    with there:
        here.close()
        with pytest.raises(EOFError):
            receive(there, 1 << 20)


def test_the_real_trainer_ends_when_its_agent_is_gone(tmp_path):
    """The socket closes without a word, as when the agent's process was killed."""
    site = tmp_path / "site.yaml"
    site.write_text(f"client: a\nhome: {tmp_path}\npolicy: {tmp_path / 'none.yaml'}\ndata: {tmp_path / 'none.jsonl'}\n")
    place = tmp_path / "d"
    place.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "s"))
        listener.listen(1)
        listener.settimeout(60)
        started = subprocess.Popen([*command(), str(place / "s")], env={**_environment(), "FEDLOOM_SITE": str(site)})
        line, _ = listener.accept()
        line.settimeout(60)
        send(line, {"kind": "work"}, b"before any recipe")
        header, _ = receive(line, 1 << 20)
        assert header["state"] == "refused"
        send(line, {"kind": "prepare"}, b"this is no JSON")
        header, _ = receive(line, 1 << 20)
        assert (header["state"], header["reason"]) == ("failed", "error")
        assert "JSONDecodeError" in header["detail"]
        assert "this is no" not in header["detail"]
        line.close()
        assert started.wait(timeout=60) == 0
    assert not place.exists()


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
