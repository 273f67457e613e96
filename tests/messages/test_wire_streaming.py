"""Streaming: the chunks are the one-piece message, bounded in size, made without a copy of the tensors."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedloom.messages import limits, wire
from fedloom.messages.operators.chain import Chain
from fedloom.messages.types import Assignment, Payload, Update
from fedloom.models.layout import Adapter, Layout


def adapter() -> Adapter:
    made = Adapter(Layout({f"layer.{i}": (1000, i + 1) for i in range(30)} | {"big": (1 << 20,)}))
    made.flat.copy_(torch.randn(made.flat.numel(), generator=torch.Generator().manual_seed(0)))
    return made


def test_chunks_are_the_message_in_bounded_pieces():
    for payload in (
        Payload(adapter().tensors()),
        Chain.parse(["quantize"]).encode(Payload(adapter().tensors())),
        Payload(),
    ):
        for message, stream in (
            (wire.encode_outcome(Update("a", 1, payload)), wire.stream_outcome(Update("a", 1, payload))),
            (
                wire.encode_assignment(Assignment("train", "a", 1, 2, payload)),
                wire.stream_assignment(Assignment("train", "a", 1, 2, payload)),
            ),
        ):
            chunks = [bytes(c) for c in stream.chunks]
            assert b"".join(chunks) == message
            assert stream.total == len(message)
            assert max(map(len, chunks)) <= limits.CHUNK_BYTES


def test_chunks_are_windows_into_the_flat_buffer_itself():
    made = adapter()
    start, end = made.flat.data_ptr(), made.flat.data_ptr() + made.nbytes
    stream = wire.stream_outcome(Update("a", 1, Payload(made.tensors())))
    inside = 0
    for chunk in stream.chunks:
        address = torch.frombuffer(bytearray(1), dtype=torch.uint8).data_ptr() if not len(chunk) else _address(chunk)
        inside += len(chunk) if start <= address < end else 0
    assert inside == made.nbytes


def _address(chunk: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(chunk, dtype=np.uint8).__array_interface__["data"][0])


def test_streaming_holds_no_more_than_a_header():
    update = Update("a", 1, Payload(adapter().tensors()))
    tracemalloc.start()
    try:
        stream = wire.stream_outcome(update)
        total = sum(len(chunk) for chunk in stream.chunks)
        assert tracemalloc.get_traced_memory()[1] < 200_000 < total // 20
    finally:
        tracemalloc.stop()


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def peak_over(work: Callable[[], int]) -> int:
    """By how much the resident memory of this process rises while `work` is done."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    assert work() > PAYLOAD
    return resident("VmHWM") - before


PAYLOAD = 128 << 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it")
def test_peak_memory_is_one_copy_in_one_piece_and_none_in_chunks():
    """A payload of fp32 without lossy operators: its numbers are copied into the message and nowhere else."""
    update = Update("a", 1, Payload({f"w{i}": torch.ones(1 << 20) for i in range(32)}))
    wire.encode_outcome(Update("a", 1, Payload({"w": torch.ones(1)})))
    assert peak_over(lambda: sum(len(c) for c in wire.stream_outcome(update).chunks)) < 0.05 * PAYLOAD
    assert peak_over(lambda: len(wire.encode_outcome(update))) < 1.1 * PAYLOAD
