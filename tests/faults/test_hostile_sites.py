"""A whole run in which one site sends what it should not, once: its update of that round is lost, nothing else is.

Three sites in this process with their real trainers' code; what site `last` hands out in round 2 of 3 is altered after it was
made. Each time the reason is in the events, the other two are averaged, and the site is back in round 3.
"""

from __future__ import annotations

import json
import resource
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedloom.federation.record.events import read_events
from fedloom.messages import wire
from fedloom.messages.types import Payload, Update
from fedloom.runtimes.sites.runtime import SPARE_BYTES
from tests.helpers.sites import between_sites

pytest.importorskip("nvflare")
pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")]

Change = Callable[[bytes, bytes], bytes]


def payload(change: Callable[[Payload], Payload]) -> Change:
    """A well-formed message with another payload."""

    def altered(message: bytes, before: bytes) -> bytes:

        update = wire.decode_outcome(message)
        assert isinstance(update, Update)
        return wire.encode_outcome(replace(update, payload=change(update.payload)))

    return altered


def first(change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> Change:
    def changed(given: Payload) -> Payload:
        (name, tensor), *others = given.tensors.items()
        return Payload(dict([change(name, tensor), *others]), given.meta, given.coding)

    return payload(changed)


def flipped(message: bytes, before: bytes) -> bytes:
    data = bytearray(message)
    data[len(data) // 2] ^= 4
    return bytes(data)


def claiming(message: bytes, before: bytes) -> bytes:
    """A header that claims the last of 32 bits."""
    return message[:4] + b"\xff\xff\xff\xff" + message[8:]


def bomb(given: Payload) -> Payload:
    """64 MB of zeros where the table says a few kilobytes."""
    made = zlib.compressobj(9, wbits=-15)
    data = made.compress(bytes(64 << 20)) + made.flush()
    name, part = next(iter(given.tensors.items()))
    raw = bytes(part[:8].tolist())
    claim = raw + len(data).to_bytes(8, "little") + data
    return Payload({**given.tensors, name: torch.frombuffer(bytearray(claim), dtype=torch.uint8)}, {}, given.coding)


PLAIN = {
    "truncated": (lambda message, before: message[: len(message) // 2], "bad_message", "digest"),
    "bit-flipped": (flipped, "bad_message", "digest"),
    "claiming": (claiming, "bad_message", "the header claims 4294967295 bytes"),
    "replayed": (lambda message, before: before, "bad_message", "another client or round"),
    "oversized": (lambda message, before: message + bytes(SPARE_BYTES * 2), "too_large", "announced"),
    "wrongly named": (first(lambda n, t: (n + ".x", t)), "bad_payload", "lora_A.weight.x"),
    "wrongly shaped": (first(lambda n, t: (n, t.T.contiguous())), "bad_payload", ""),
    "missing": (payload(lambda p: Payload(dict(list(p.tensors.items())[1:]))), "bad_payload", "missing"),
    "not finite": (first(lambda n, t: (n, t * float("nan"))), "bad_payload", "finite"),
}


@pytest.mark.parametrize("what", ["bomb", *PLAIN])  # the bomb first: memory only ever shows its highest
def test_a_hostile_update_is_a_failure_that_names_the_reason(tiny_recipe, dealt, tmp_path, what):
    change, reason, words = PLAIN.get(what) or (payload(bomb), "bad_payload", "")
    operators = {"operators": {"up": [{"name": "deflate"}]}} if what == "bomb" else {}
    recipe = tiny_recipe({"federation.rounds": 3, "evaluation.every": 0, **operators})
    sent: list[bytes] = []

    def alter(client: str, asked: bytes, message: bytes) -> bytes:
        assignment = wire.decode_assignment(asked)
        if client != "last" or assignment.kind != "train":
            return message
        sent.append(message)
        return change(message, sent[0]) if assignment.round == 2 else message

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    between_sites(recipe, dealt(recipe), tmp_path / "sites", alter)
    if what != "oversized":  # which this process makes itself
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < 48 << 20
    events = read_events(tmp_path / "sites" / "run" / "events.jsonl")
    failures = [(e["round"], e["client"], e["reason"]) for e in events if e["event"] == "client_failed"]
    assert failures == [(2, "last", reason)]
    assert words in next(e["detail"] for e in events if e["event"] == "client_failed")
    assert [e["updates"] for e in events if e["event"] == "round_finished"] == [3, 2, 3]
    audit = (tmp_path / "sites" / "last" / "audit.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"time", "what", "bytes", "sha256"} for line in audit)
