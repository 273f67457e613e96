"""A full disk at a site: a real one (a small tmpfs) under the client's state, and one that takes no line of the audit log."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from pathlib import Path

import pytest
from sites import between_sites
from test_disk import mount

from fedloom.runtimes import wire
from fedloom.tracking import read_events

pytest.importorskip("nvflare")
pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_waiting", "no_reports")]


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_full_disk_at_a_site_costs_its_updates_until_there_is_room(tiny_recipe, dealt, tmp_path):
    """Full in rounds 2 and 3; what the site tells is a code."""
    recipe = tiny_recipe({"federation.rounds": 4, "train.optimizer_state": "keep", "evaluation.every": 0})
    runs = tmp_path / "sites" / "last" / "runs"
    runs.mkdir(parents=True)
    mount(runs, "size=4m")
    try:

        def alter(client: str, asked: bytes, message: bytes) -> bytes:
            assignment = wire.decode_assignment(asked)
            if client == "last" and assignment.kind == "train":
                if assignment.round == 1:
                    fill(runs / "other")
                if assignment.round == 3:
                    (runs / "other").unlink()
            return message

        between_sites(recipe, dealt(recipe), tmp_path / "sites", alter)
    finally:
        subprocess.run(["umount", runs], check=True)
    events = read_events(tmp_path / "sites" / "run" / "events.jsonl")
    failed = [e for e in events if e["event"] == "client_failed"]
    assert [(e["client"], e["round"], e["reason"]) for e in failed] == [("last", 2, "disk"), ("last", 3, "disk")]
    assert all(str(tmp_path) not in e["detail"] for e in failed)
    assert [e["updates"] for e in events if e["event"] == "round_finished"] == [3, 2, 2, 3]


def test_a_site_that_cannot_write_its_audit_log_says_nothing():
    """No answer leaves that the log does not list, and no word of the error leaves either."""
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
    from nvflare.fuel.f3.message import Message

    from fedloom.runtimes.flare.link import handler, start

    def answer(header, data):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/patients/audit.jsonl")

    request = Message({MessageHeaderKey.ORIGIN: "server.job"}, start({"verb": "hello"}))
    reply = handler(answer, "server.job")(request)
    assert reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.PROCESS_EXCEPTION
    assert "patients" not in f"{reply.headers} {reply.payload}"
