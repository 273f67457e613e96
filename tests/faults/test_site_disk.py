"""A full disk at a site: a real one (a small tmpfs) under the client's state, and one that takes no line of the audit log."""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fedloom.federation.record.events import read_events
from fedloom.messages import wire
from fedloom.messages.types import Assignment, Failure, Payload, Update
from fedloom.runtimes.sites.runtime import Distributed
from tests.helpers.disks import mount, remount
from tests.helpers.sites import BRISK, Sites, between_sites

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

    from fedloom.runtimes.sites.flare.link import handler, start

    def answer(header, data):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/patients/audit.jsonl")

    request = Message({MessageHeaderKey.ORIGIN: "server.job"}, start({"verb": "hello"}))
    reply = handler(answer, "server.job")(request)
    assert reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.PROCESS_EXCEPTION
    assert "patients" not in f"{reply.headers} {reply.payload}"


class Hearing(Sites):
    """As the engine's link: a site whose answer could not be made has given none."""

    def ask(self, site, header, data, timeout):
        try:
            return super().ask(site, header, data, timeout)
        except OSError:
            return None


def read_only(disk: Path) -> None:
    """The answer to a question that nobody waits for may be on its way into the log."""
    until = time.monotonic() + 60
    while True:
        try:
            return remount(disk, "ro")
        except subprocess.CalledProcessError:
            assert time.monotonic() < until
            time.sleep(0.05)


def echo(kind, body, deadline=None, stopped=None):
    if kind == "prepare":
        counts = {"train": 5, "validation": 1, "test": 2, "questions": 0, "tokens": 40}
        return {"state": "done"}, json.dumps(counts).encode()
    given = wire.decode_assignment(body)
    update = Update(given.client, given.round, Payload(dict(given.payload.tensors)), 5, 40, {"loss": 1.0})
    return {"state": "done"}, wire.encode_outcome(update)


def test_a_site_whose_audit_log_takes_no_line_is_lost_until_it_does(tmp_path):
    """A disk that can only be read, in round 2; the other site does not notice."""
    home = tmp_path / "a"
    mount(home, "size=1m")
    try:
        link = Hearing(tmp_path, {"a": echo, "b": echo})
        runtime = Distributed(link, {"client-a": "a", "client-b": "b"}, ["a", "b"], BRISK)
        recipe = {
            "algorithm": {"name": "fedavg"},
            "adapter": {"method": "lora"},
            "federation": {"rounds": 3},
            "model": {},
        }
        assert set(runtime.greet(recipe, "0" * 32)) == {"client-a", "client-b"}

        def outcomes(round):
            payload = Payload({"w": torch.ones(3)})
            found = runtime.run(Assignment("train", c, round, 3, payload) for c in ("client-a", "client-b"))
            return {outcome.client: outcome for outcome in found}

        assert all(isinstance(o, Update) for o in outcomes(1).values())
        read_only(home)
        before = (home / "audit.jsonl").read_text()
        lost = outcomes(2)
        assert isinstance(lost["client-a"], Failure) and lost["client-a"].reason == "lost"
        assert isinstance(lost["client-b"], Update)
        assert (home / "audit.jsonl").read_text() == before
        remount(home, "rw")
        assert all(isinstance(o, Update) for o in outcomes(3).values())
        assert len((home / "audit.jsonl").read_text()) > len(before)
        runtime.close()
        link.close()
    finally:
        subprocess.run(["umount", home], check=True)
