"""Compressed parts: their heads, what an honest encoder writes, and what is refused before it is unpacked."""

from __future__ import annotations

import gzip
import zlib

import pytest
import torch

from fedloom.messages import limits
from fedloom.messages.operators.base import Around
from fedloom.messages.operators.compress import HEAD, _padding_size
from fedloom.messages.operators.flat import BadPayload, Part, Table
from fedloom.messages.types import Payload
from tests.helpers.payloads import chain_of, same

KINDS = ["deflate", "gzip", "zstd", "lz4"]
AROUND = Around(Table.of({}), None, None, True)


def operator(kind: str, **options):
    return chain_of({"name": kind, **options}).operators[0]


def packed(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def decoded(kind: str, data: bytes, part: Part) -> torch.Tensor:
    return operator(kind).decode({f"x.{kind}": packed(data)}, {"x": part}, {}, AROUND)["x"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_its_two_lengths_and_its_bytes(kind):
    values = torch.arange(1000, dtype=torch.int32)
    made, notes = operator(kind).encode({"x": values}, AROUND)
    assert notes == {} and set(made) == {f"x.{kind}"}
    data = bytes(made[f"x.{kind}"].numpy())
    raw, squeezed = HEAD.unpack(data[:16])
    assert (raw, squeezed, len(data)) == (4000, len(data) - 16, 16 + squeezed)
    assert torch.equal(decoded(kind, data, Part(torch.int32, 1000)), values)
    if kind == "deflate":
        assert zlib.decompress(data[16:], wbits=-15) == values.numpy().tobytes()
    if kind == "gzip":
        assert gzip.decompress(data[16:]) == values.numpy().tobytes()
    again, _ = operator(kind).encode({"x": values}, AROUND)
    assert torch.equal(again[f"x.{kind}"], made[f"x.{kind}"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_tensor_alone_and_a_scalar_alone(kind):
    for tensor in (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int8), torch.tensor(3.5)):
        sent = {"w": tensor}
        assert same(chain_of(kind).decode(chain_of(kind).encode(Payload(sent))).tensors, sent)


@pytest.mark.parametrize("kind", KINDS)
def test_what_shrinks_further_than_the_ratio_is_padded_with_zeros(kind):
    zeros = torch.zeros(4_000_000, dtype=torch.uint8)
    made, _ = operator(kind).encode({"x": zeros}, AROUND)
    data = bytes(made[f"x.{kind}"].numpy())
    _, squeezed = HEAD.unpack(data[:16])
    assert len(data) >= 4_000_000 / limits.COMPRESSION_RATIO
    assert len(data) == max(16 + squeezed, 4000) and not any(data[16 + squeezed :])
    assert torch.equal(decoded(kind, data, Part(torch.uint8, 4_000_000)), zeros)


def test_padding_by_hand():
    assert [_padding_size(raw, squeezed) for raw, squeezed in ((0, 1), (16_000, 0), (16_001, 0), (20_000, 1), (20_000, 9))] == [
        0, 0, 1, 3, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_head_may_not_claim(kind):
    values = torch.arange(1000, dtype=torch.int32)
    data = bytes(operator(kind).encode({"x": values}, AROUND)[0][f"x.{kind}"].numpy())
    raw, squeezed = HEAD.unpack(data[:16])
    whole, bound = Part(torch.int32, 1000), Part(torch.int32, 1001, bound=True)
    assert torch.equal(decoded(kind, data, bound), values)

    def head(one: int, two: int) -> bytes:
        return HEAD.pack(one, two) + data[16:]

    for wrong, part, sentence in (
        (data[:15], whole, "shorter than its own head"),
        (b"", whole, "shorter than its own head"),
        (data, Part(torch.int32, 999), "claims 4000 bytes, but must have 3996"),
        (data, Part(torch.int32, 1001), "claims 4000 bytes, but must have 4004"),
        (data, Part(torch.int32, 999, bound=True), "claims 4000 bytes, but must have 3996"),
        (head(4003, squeezed), bound, "truncated, or longer than it claims"),  # no whole number of elements
        (head(raw, squeezed - 1), whole, "truncated, or longer than it claims"),
        (head(raw, squeezed + 1), whole, "truncated, or longer than it claims"),
        (data + b"\0", whole, "truncated, or longer than it claims"),
        (data[:-1], whole, "truncated, or longer than it claims"),
        (head(3996, squeezed), bound, "does not have the 3996|damaged"),
        (head(4004, squeezed), bound, "does not have the 4004|damaged"),
        (HEAD.pack(raw, squeezed) + bytes(squeezed), whole, "damaged|does not have"),
    ):
        with pytest.raises(BadPayload, match=sentence):
            decoded(kind, wrong, part)


@pytest.mark.parametrize("kind", ["zstd"])
def test_padding_that_is_not_zero_is_refused(kind):
    made, _ = operator(kind).encode({"x": torch.zeros(4_000_000, dtype=torch.uint8)}, AROUND)
    data = bytearray(made[f"x.{kind}"].numpy().tobytes())
    assert HEAD.unpack(data[:16])[1] + 16 < len(data)
    data[-1] = 1
    with pytest.raises(BadPayload, match="truncated, or longer than it claims"):
        decoded(kind, bytes(data), Part(torch.uint8, 4_000_000))


def test_a_bomb_is_not_unpacked():
    squeezed = zlib.compress(bytes(50_000_000), 9)[2:-4]
    with pytest.raises(BadPayload, match="claim to hold 50000000, but at most 1000 times as many"):
        decoded("deflate", HEAD.pack(50_000_000, len(squeezed)) + squeezed, Part(torch.uint8, 50_000_000))


@pytest.mark.parametrize("kind", ["deflate", "gzip"])
def test_a_stream_that_holds_a_byte_more_or_is_followed_by_another_is_refused(kind):
    squeeze = operator(kind).squeeze
    for size, stream in (
        (3, squeeze(memoryview(b"abcd"))),
        (3, squeeze(memoryview(b"abc")) * 2),
        (0, squeeze(memoryview(b"a"))),
    ):
        data = HEAD.pack(size, len(stream)) + stream
        with pytest.raises(BadPayload, match=r"damaged|does not have"):
            decoded(kind, data, Part(torch.uint8, size))
    for size in (0, 3):
        stream = squeeze(memoryview(b"abc"[:size]))
        assert decoded(kind, HEAD.pack(size, len(stream)) + stream, Part(torch.uint8, size)).numel() == size


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_does_not_shrink_stays_within_its_bound(kind):
    noise = torch.randint(0, 256, (100_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    spec = {"x": Part(torch.uint8, 100_000)}
    bound = operator(kind).layout(spec)[f"x.{kind}"]
    assert bound == Part(torch.uint8, 16 + 100_000 * 17 // 16 + 1024, bound=True)
    assert operator(kind).encode({"x": noise}, AROUND)[0][f"x.{kind}"].numel() <= bound.count


@pytest.mark.parametrize(
    ("kind", "levels"), [("deflate", (1, 9)), ("gzip", (1, 9)), ("zstd", (1, 19)), ("lz4", (0, 12))]
)
def test_levels_trade_time_for_size(kind, levels):
    text = torch.frombuffer(bytearray(b"".join(b"%d " % (i * i) for i in range(20_000))), dtype=torch.uint8)
    fast, small = (operator(kind, level=n).encode({"x": text}, AROUND)[0][f"x.{kind}"].numel() for n in levels)
    assert small < fast < text.numel()
    for outside in (levels[0] - 1, levels[1] + 1):
        with pytest.raises(ValueError, match=f"level={outside}"):
            operator(kind, level=outside)


@pytest.mark.parametrize(("kind", "window"), [("deflate", -15), ("gzip", 31)])
def test_a_stream_with_the_largest_window_of_deflate_is_read_and_written(kind, window):
    """Bytes that repeat after 30,000 others: a smaller window neither finds nor follows that."""
    noise = torch.randint(0, 256, (30_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = torch.cat([noise, noise])
    squeezer = zlib.compressobj(9, wbits=window)
    stream = squeezer.compress(values.numpy().tobytes()) + squeezer.flush()
    data = HEAD.pack(60_000, len(stream)) + stream
    assert torch.equal(decoded(kind, data, Part(torch.uint8, 60_000)), values)
    assert operator(kind).encode({"x": values}, AROUND)[0][f"x.{kind}"].numel() < 35_000
