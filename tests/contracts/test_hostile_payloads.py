"""Payloads that were made up: each is refused with one sentence, and nothing of the size that it claims is allocated."""

from __future__ import annotations

import copy
import gzip
import lzma
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import torch

from fedloom.messages import limits
from fedloom.messages.operators.flat import BadPayload
from fedloom.messages.types import Payload
from tests.helpers.payloads import LOSSLESS, LOSSY, chain_of, name_of, of

TENSORS = {"w": of(torch.float32, (40, 30)), "n": of(torch.int64, (5,))}


def honest(*described) -> Payload:
    return copy.deepcopy(chain_of(*described).encode(Payload(TENSORS), reference=TENSORS))


def refused(payload: Payload, *described) -> str:
    with pytest.raises(BadPayload) as error:
        chain_of(*described).decode(payload, TENSORS)
    sentence = str(error.value)
    assert sentence and "\n" not in sentence and len(sentence) < 300
    return sentence


def changed(payload: Payload, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Payload:
    return Payload({**payload.tensors, part: change(payload.tensors[part])}, payload.meta, payload.coding)


def put(place: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[place] = value
        return values

    return change


@pytest.mark.parametrize("described", LOSSLESS + LOSSY, ids=name_of)
def test_a_missing_longer_shorter_or_foreign_part_is_refused(described):
    whole = honest(described)
    for part, values in whole.tensors.items():
        without = Payload({n: t for n, t in whole.tensors.items() if n != part}, {}, whole.coding)
        assert "the payload has the parts" in refused(without, described)
        for other in (values[:-1], values.reshape(1, -1), values.to(torch.complex64)):
            refused(changed(whole, part, lambda _, other=other: other), described)
        longer = torch.cat([values] * 3) if values.numel() else values.new_zeros(5000)
        refused(changed(whole, part, lambda _, longer=longer: longer), described)
    more = Payload({**whole.tensors, "x": torch.ones(1)}, {}, whole.coding)
    assert "the payload has the parts" in refused(more, described)


@pytest.mark.parametrize("described", LOSSLESS + LOSSY, ids=name_of)
def test_notes_and_chains_that_are_not_the_recipes_are_refused(described):
    whole = honest(described)
    for coding in (
        {},
        {**whole.coding, "operators": []},
        {**whole.coding, "operators": ["zip"]},
        {**whole.coding, "operators": None},
    ):
        assert "the recipe's operators" in refused(Payload(whole.tensors, {}, coding), described)
    assert "the recipe's operators" in refused(Payload(TENSORS), described)
    for notes in (
        None,
        [],
        [{}, {}],
        [None],
        [{"seed": -1}],
        [{"seed": 1.5}],
        [{"seed": True}],
        [{"seed": 1 << 60}],
        [{"more": 1}],
    ):
        assert "notes" in refused(Payload(whole.tensors, {}, {**whole.coding, "notes": notes}), described)
    assert "no mapping" in refused(Payload(whole.tensors, {}, {**whole.coding, "table": [1]}), described)


def test_a_plain_side_does_not_take_an_encoded_payload():
    assert "the recipe's operators" in refused(honest("bf16"))


@pytest.mark.parametrize("described", LOSSLESS + LOSSY, ids=name_of)
def test_a_table_that_claims_more_than_there_is_allocates_nothing(described):
    whole = honest(described)
    tracemalloc.start()
    try:
        for shape in ([1 << 33], [1 << 20, 1 << 13], [1 << 60], [-1], [1 << 22]):
            table = {"F32": [["w", shape]], "I64": [["n", [5]]]}
            refused(Payload(whole.tensors, {}, {**whole.coding, "table": table}), described)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_callers_own_bound_counts():
    chain = chain_of("bf16")
    chain.decode(honest("bf16"), max_bytes=4840)
    with pytest.raises(BadPayload, match="claims 4840 bytes, but at most 4839"):
        chain.decode(honest("bf16"), max_bytes=4839)


@pytest.mark.parametrize("bits", [8, 4, "ternary"])
def test_scales_and_levels_out_of_range_are_refused(bits):
    described = {"name": "quantize", "bits": bits}
    for word in (0x7FC0, 0x7F80, -0x80 - 0x0, -0x4080):  # NaN, Inf, -Inf, -1
        assert "a scale" in refused(changed(honest(described), "F32.scales", put(0, word)), described)
    assert "highest level" in refused(changed(honest(described), "F32.codes", put(3, 255)), described)


def test_a_negative_scale_belongs_to_bits_2_and_nan_to_none():
    described = {"name": "quantize", "bits": 2}
    chain_of(described).decode(changed(honest(described), "F32.scales", put(0, -0x4080)))
    assert "a scale" in refused(changed(honest(described), "F32.scales", put(0, 0x7FC0)), described)


def test_places_out_of_range_are_refused():
    sparse, dense = {"name": "sparsify", "fraction": 0.02}, {"name": "sparsify", "fraction": 0.5}
    assert "index names" in refused(changed(honest(sparse), "F32.index", put(-1, 255)), sparse)  # one too few
    ends = changed(honest(sparse), "F32.index", lambda t: torch.full((24,), 254, dtype=torch.uint8))
    assert "element 6119, but there are only 1200" in refused(ends, sparse)
    assert "index names 25" in refused(
        changed(honest(sparse), "F32.index", lambda t: torch.zeros(25, dtype=torch.uint8)), sparse
    )
    assert "but 600 are sent" in refused(changed(honest(dense), "F32.index", lambda t: t ^ 1), dense)
    odd = {"name": "sparsify", "fraction": 0.5}
    payload = chain_of(odd).encode(Payload({"w": torch.arange(1.0, 10.0)}))  # nine elements, five of them kept
    moved = torch.tensor([0b00001111, 0b00000010], dtype=torch.uint8)  # the tenth
    with pytest.raises(BadPayload, match="index marks 5 elements of 9"):
        chain_of(odd).decode(changed(payload, "F32.index", lambda t: moved))


def test_a_difference_without_its_broadcast_is_refused():
    for described in (["delta"], ["delta", "bf16"]):
        payload = chain_of(*described).encode(Payload(TENSORS), reference=TENSORS)
        with pytest.raises(BadPayload, match="no broadcast"):
            chain_of(*described).decode(payload)


def deflated(data: bytes, wbits: int) -> bytes:
    made = zlib.compressobj(9, wbits=wbits)
    return made.compress(data) + made.flush()


def squeezed(name: str, data: bytes) -> bytes:
    if name in {"deflate", "gzip"}:
        return deflated(data, -15 if name == "deflate" else 31)
    if name == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=3).compress(data)
    import lz4.frame

    return lz4.frame.compress(data)


def part(raw: int, data: bytes, length: int | None = None, padding: int | None = None) -> torch.Tensor:
    head = struct.pack("<QQ", raw, len(data) if length is None else length)
    padding = max(0, -(-raw // 1000) - len(data) - 16) if padding is None else padding
    return torch.frombuffer(bytearray(head + data + bytes(padding)), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["deflate", "gzip", "zstd", "lz4"])
def test_a_bomb_is_refused_by_its_claim_by_the_ratio_and_by_what_comes_out(name):
    size = 4 << 20
    zeros = {"w": torch.zeros(size // 4)}
    whole = chain_of(name).encode(Payload(zeros))
    key = f"F32.{name}"
    honest_part = whole.tensors[key]
    assert len(honest_part) >= size // limits.COMPRESSION_RATIO  # padded, so that an honest message is none
    assert torch.equal(chain_of(name).decode(whole).tensors["w"], zeros["w"])
    bomb = squeezed(name, bytes(size))

    def said(made: torch.Tensor) -> str:
        return refused(changed(whole, key, lambda _: made), name)

    tracemalloc.start()
    try:
        assert "claims" in said(part(1 << 60, bomb, padding=0))
        assert "claims" in said(part(size - 4, bomb))
        tiny = squeezed(name, bytes(64))
        assert "1000 times" in said(part(size, tiny, padding=0))
        assert "truncated" in said(part(size, bomb, length=1 << 62))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    for longer in (torch.zeros(5, dtype=torch.uint8), torch.ones(5, dtype=torch.uint8)):
        assert "longer than it claims" in said(torch.cat([honest_part, longer]))
    if len(honest_part) == -(-size // 1000):  # something hidden in the padding
        assert "longer than it claims" in said(put(-1, 1)(honest_part))
    assert "shorter than its own head" in said(torch.zeros(15, dtype=torch.uint8))
    for data in (
        squeezed(name, bytes(16 * size)),
        squeezed(name, bytes(size + 1)),
        squeezed(name, bytes(size - 1)),
        bomb[:-1],
        bomb + b"x",
    ):
        sentence = said(part(size, data))
        assert "damaged" in sentence or "does not have" in sentence
    for foreign in (b"", b"\0" * 40, lzma.compress(b"x"), gzip.compress(b"x") * 2, b"\x80\x04\x95" * 9):
        sentence = said(part(size, foreign))
        assert "damaged" in sentence or "does not have" in sentence


def test_a_bomb_is_not_unpacked_beyond_its_claim():
    """64 MB of zeros behind a claim of 256 KB, in a part of an allowed size: memory stays under a megabyte."""
    data = squeezed("deflate", bytes(1 << 26))
    whole = chain_of("deflate").encode(Payload({"w": torch.zeros(1 << 16)}))
    tracemalloc.start()
    try:
        assert "damaged" in refused(changed(whole, "F32.deflate", lambda _: part(1 << 18, data)), "deflate")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("described", LOSSLESS + LOSSY, ids=name_of)
def test_parts_of_noise_raise_nothing_else(described):
    whole, draw = honest(described), random.Random(3)
    for _ in range(25):
        payload = whole
        for name, values in whole.tensors.items():
            data = bytearray(bytes(values.view(torch.uint8).tolist()))
            for _ in range(draw.randint(0, 3)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            noisy = torch.frombuffer(data, dtype=torch.uint8).view(values.dtype)
            payload = changed(payload, name, lambda _, noisy=noisy: noisy)
        try:
            got = chain_of(described).decode(payload, TENSORS)
        except BadPayload:
            continue
        assert {n: t.shape for n, t in got.tensors.items()} == {n: t.shape for n, t in TENSORS.items()}
