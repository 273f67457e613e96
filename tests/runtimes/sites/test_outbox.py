"""Messages that wait: the same bytes from memory and from disk, as they were when they were taken down."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from fedloom.messages import wire
from fedloom.messages.types import Assignment, Payload
from fedloom.runtimes.sites import outbox as outgoing
from fedloom.runtimes.sites.link import PIECE
from fedloom.runtimes.sites.outbox import Message, Outgoing


def assignment(numel: int = 1000) -> Assignment:
    return Assignment("train", "a", 1, 2, Payload({"x": torch.arange(numel, dtype=torch.float32)}), 1)


def whole(message: Message) -> bytes:
    return b"".join(message.piece(at) for at in range(0, len(message), PIECE))


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_what_waits_is_the_message_as_it_was(tmp_path, monkeypatch, most):
    monkeypatch.setattr(outgoing, "PIECE", 999)
    sent = assignment()
    wanted = wire.encode_assignment(sent)
    message = Outgoing(tmp_path / "new", most).take(wire.stream_assignment(sent))
    sent.payload.tensors["x"].zero_()  # the next round
    assert len(message) == len(wanted)
    assert b"".join(message.piece(at) for at in range(0, len(message), 999)) == wanted
    assert message.piece(len(wanted)) == b""
    message.close()
    message.close()


def test_memory_is_given_back_and_only_what_is_too_much_goes_to_disk(tmp_path):
    size = len(wire.encode_assignment(assignment()))
    place = Outgoing(tmp_path, most=2 * size)
    first, second, third = (place.take(wire.stream_assignment(assignment())) for _ in range(3))
    assert [m._file is None for m in (first, second, third)] == [True, True, False]
    assert whole(first) == whole(third)
    first.close()
    fourth = place.take(wire.stream_assignment(assignment()))
    assert fourth._file is None
    for message in (second, third, fourth):
        message.close()
    assert place._held == 0


def test_nothing_is_left_on_disk_nor_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    message = Outgoing(tmp_path, most=0).take(wire.stream_assignment(assignment()))
    assert list(tmp_path.iterdir()) == []  # a file without a name
    message.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(AssertionError, match="closed"):
        message.piece(0)


def test_a_message_over_the_bound_takes_no_memory_of_its_size(tmp_path):
    """160 MB: the payload is there once, and the message beside it is on disk."""
    sent = assignment(40 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = Outgoing(tmp_path, most=100 << 20).take(wire.stream_assignment(sent))
    pieces = sum(len(message.piece(at)) for at in range(0, len(message), PIECE))
    message.close()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert pieces > 160 << 20
    assert grown < 80 << 10, f"{grown} KB"
