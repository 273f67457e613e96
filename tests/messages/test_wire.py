"""Messages: every dtype comes back as it went, and nothing that was truncated, altered or made up gets through."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from fedloom.messages import limits, wire
from fedloom.messages.types import Assignment, Cost, Failure, Payload, Update

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip
SHAPES = [(), (0,), (1,), (3, 5), (2, 0, 4), (2, 3, 4)]


def of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits (for bool, random truth)."""
    generator = torch.Generator().manual_seed(1)
    count = int(torch.tensor(shape).prod()) if shape else 1
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def assignment(**fields) -> Assignment:
    values = {"kind": "train", "client": "a", "round": 1, "rounds": 2, "payload": Payload(), **fields}
    return Assignment(**values)


def update(**fields) -> Update:
    payload = Payload(
        {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(4)}, {"note": "x", "n": [1, 2.5, None, True]}
    )
    return Update(
        "client ü/1", 3, payload, 7, 70, {"loss": 1.5, "skipped_steps": 0}, Cost(1, 2, 3, 4, 5, 0.5, 0.25), **fields
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype):
    sent = Payload({str(shape): of(dtype, shape) for shape in SHAPES})
    got = wire.decode_assignment(wire.encode_assignment(assignment(payload=sent))).payload
    assert set(got.tensors) == set(sent.tensors)
    for name, tensor in sent.tensors.items():
        assert (got.tensors[name].dtype, got.tensors[name].shape) == (dtype, tensor.shape)
        assert bits(got.tensors[name]) == bits(tensor)


def test_special_values_survive():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    got = wire.decode_outcome(wire.encode_outcome(Update("a", 1, Payload({"x": values}))))
    assert bits(got.payload.tensors["x"]) == bits(values)


def test_windows_into_one_buffer_and_transposed_tensors_travel():
    flat = torch.arange(12.0)
    sent = Payload({"a": flat[:6].view(2, 3), "b": flat[6:10], "t": flat.view(3, 4).t()})
    got = wire.decode_assignment(wire.encode_assignment(assignment(payload=sent))).payload.tensors
    for name, tensor in sent.tensors.items():
        assert torch.equal(got[name], tensor)


def test_every_field_comes_back():
    sent = assignment(
        kind="evaluate", client="Zürich/é", round=4, rounds=9, steps=None, dataset="pooled", score=False,
        recipe={"train": {"lr": 1e-3}, "names": ["x", None]}, payload=Payload({}, {"k": {"deep": [1]}}),
    )  # fmt: skip
    assert wire.decode_assignment(wire.encode_assignment(sent)) == sent
    got = wire.decode_outcome(wire.encode_outcome(update()))
    assert isinstance(got, Update)
    assert (got.client, got.round, got.num_examples, got.num_tokens) == ("client ü/1", 3, 7, 70)
    assert (dict(got.metrics), got.cost, got.payload.meta) == (
        dict(update().metrics),
        update().cost,
        update().payload.meta,
    )
    failure = Failure("a", 2, "non_finite", "the loss of step 3", Cost(steps=3))
    assert wire.decode_outcome(wire.encode_outcome(failure)) == failure


def test_encoding_is_the_same_each_time():
    assert wire.encode_outcome(update()) == wire.encode_outcome(update())


def decode_either(message: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_outcome(message)
    with pytest.raises(wire.WireError):
        wire.decode_assignment(message)


def test_every_truncation_is_refused():
    message = wire.encode_outcome(update())
    for length in range(len(message)):
        with pytest.raises(wire.WireError):
            wire.decode_outcome(message[:length])
    header, body = taken_apart(message)
    for length in range(len(body)):  # with a digest that is right
        with pytest.raises(wire.WireError):
            wire.decode_outcome(packed({**header, "body": {"bytes": length}}, body[:length]))
    with pytest.raises(wire.WireError):
        wire.decode_outcome(message + b"\0")


def test_an_altered_byte_is_refused_wherever_it_is():
    message = wire.encode_outcome(update())
    for at in range(len(message)):
        altered = bytearray(message)
        altered[at] ^= 1
        with pytest.raises(wire.WireError):
            wire.decode_outcome(bytes(altered))


def test_a_message_without_a_seal_is_as_long_says_the_same_and_is_refused_by_whoever_looks():
    made = [
        (update(), wire.encode_outcome, wire.decode_outcome),
        (Failure("a", 1, "lost", "gone"), wire.encode_outcome, wire.decode_outcome),
        (assignment(payload=update().payload), wire.encode_assignment, wire.decode_assignment),
    ]
    for sent, encode, decode in made:
        sealed, plain = encode(sent), encode(sent, sealed=False)
        assert plain == sealed[:-32] + bytes(32)
        assert encode(decode(plain, sealed=False)) == sealed
        with pytest.raises(wire.WireError, match="does not match its digest"):
            decode(plain)


@pytest.mark.parametrize(
    "shapes", [{"a": (16,), "b": (4, 8)}, {"a": (16,), "b": (3,), "c": (), "d": (0, 5), "e": (33,)}]
)
def test_tensors_of_every_size_come_back_each_on_an_aligned_place(shapes):
    tensors = {n: torch.randn(shape) for n, shape in shapes.items()}
    sent = Update("a", 1, Payload({**tensors, "i": torch.arange(5)}))
    got = wire.decode_outcome(wire.encode_outcome(sent)).payload.tensors
    assert {n: bits(t) for n, t in got.items()} == {n: bits(t) for n, t in sent.payload.tensors.items()}
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in sent.payload.tensors.items()}
    assert all(t.data_ptr() % wire.ALIGNMENT == 0 for t in got.values() if t.numel())


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"FLM2",
        b"FLM2\0\0\0",
        b"FLM1" + b"\0" * 50,
        b"FLM2" + b"\0" * 50,
        b"PK\3\4" + b"\0" * 50,
        b"\x80\x04." * 9,
        b"\0" * 8,
    ],
)
def test_foreign_bytes_are_refused(message):
    decode_either(message)


def packed(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """A message with a digest that is right, whatever is in it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = wire.MAGIC + struct.pack("<I", len(text) if length is None else length) + text + body
    return start + hashlib.sha256(start).digest()


def taken_apart(message: bytes) -> tuple[dict, bytes]:
    """(header, body)."""
    size = struct.unpack("<I", message[4:8])[0]
    return json.loads(message[8 : 8 + size]), message[8 + size : -32]


def honest(**changes):
    """A header that would be taken, with some fields changed."""
    header, body = taken_apart(wire.encode_outcome(update()))
    return packed({**header, **changes}, body)


def body_of(entries: object, data: bytes = b"") -> bytes:
    """A body as safetensors lays it out, with whatever table it is given."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


DEEP: dict = {}
for _ in range(40):
    DEEP = {"k": DEEP}


@pytest.mark.parametrize(
    "message",
    [
        packed({}, length=0xFFFFFFFF), packed({}, length=1 << 20), packed({}), packed([]), packed(b"null"), packed(b"7"),
        packed(b"\xff\xfe"), packed(b"{"), packed(b"[" * 60000), packed({"body": 3}), packed({"body": {}}),
        honest(message="gossip"), honest(message=None), honest(fields=None), honest(fields=[1]), honest(fields={}),
        honest(cost=None), honest(cost={"gold": 1}), honest(meta=None), honest(meta=[1]), honest(meta={"k": "x" * 20000}),
        honest(cost={"wall_seconds": float("nan")}), honest(version=1), honest(version=None), honest(body={"bytes": 1}),
        honest(meta=DEEP), honest(operators=None), honest(operators={}), honest(notes=[{}]), honest(notes=None),
        honest(operators=[{"name": "zstd"}] * 17, notes=[{}] * 17),
        honest(fields={"client": "a", "round": 1, "payload": 1}),
        honest(fields={"client": "a", "round": 1, "__class__": "evil"}),
    ],
)  # fmt: skip
def test_made_up_headers_are_refused(message):
    decode_either(message)


def test_metadata_that_is_refused_says_why():
    with pytest.raises(wire.WireError, match="deeper than 32 levels"):
        wire.decode_outcome(honest(meta=DEEP))
    with pytest.raises(wire.WireError, match="at most 16384"):
        wire.decode_outcome(honest(meta={"k": "x" * 20000}))


def test_unknown_fields_name_the_other_version():
    with pytest.raises(wire.WireError, match=r"unknown fields \['extra'\].*another version"):
        wire.decode_outcome(honest(fields={"client": "a", "round": 1, "extra": 1}))


def test_an_assignment_is_no_outcome_and_the_other_way_round():
    with pytest.raises(wire.WireError, match="update or failure"):
        wire.decode_outcome(wire.encode_assignment(assignment()))
    with pytest.raises(wire.WireError, match="expected assignment"):
        wire.decode_assignment(wire.encode_outcome(update()))


def test_a_message_over_the_limit_is_refused():
    message = wire.encode_outcome(update())
    wire.decode_outcome(message, max_bytes=len(message))
    with pytest.raises(wire.WireError, match=f"at most {len(message) - 1}"):
        wire.decode_outcome(message, max_bytes=len(message) - 1)


V, W = ["v", [4]], ["w", [2, 3]]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "no mapping"), ([], "no mapping"), ({"F32": None}, "no mapping"), ({"F32": [W, V]}, "sorted order"),
        ({"F32": [V, W], "BOOL": []}, "sorted order"), ({"F32": [V, ["v", [6]]]}, "'v' twice"), ({"F33": [V, W]}, "'F33'"),
        ({"F32": [V, ["w", [2, -3]]]}, "sizes, each 0 or more"), ({"F32": [V, ["w", [1] * 17]]}, "at most 16 sizes"),
        ({"F32": [V, ["w", [True, 6]]]}, "sizes, each 0 or more"), ({"F32": [V, ["w", [2.0, 3]]]}, "sizes, each 0 or more"),
        ({"F32": [V, ["w", 6]]}, "not [name, shape]"), ({"F32": [V, "w6"]}, "not [name, shape]"),
        ({"F32": [V, ["w" * 600, [6]]]}, "not [name, shape]"), ({"F32": [V, ["w", [2, 4]]]}, "10 of F32"),
        ({"F32": [V]}, "10 of F32"), ({"I32": [V, W]}, "the payload has the parts"), ({"F32": [V, ["w", [1 << 60]]]}, "sizes, each 0 or more"),
        ({"F32": [V, ["w", [1 << 30, 1 << 30]]]}, "larger than the largest"),
        ({"F32": [V, ["w", [1 << 30, 1 << 30, 0]]]}, "larger than the largest"),
        ({"F32": [V, ["w", [1 << 35]]]}, "claims 137438953488 bytes"),
        ({"F32": [[f"{i:07}", [0]] for i in range(100_001)]}, "more than 100000"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_with_a_sentence(table, words):
    with pytest.raises(wire.WireError) as refused:
        wire.decode_outcome(honest(table=table))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "shorter"), (body_of(b"", b"")[:7], "shorter"), (struct.pack("<Q", 1 << 60), "claims more"), (body_of(b"["), "read"), (body_of([]), "no mapping"),
        (body_of({"F32": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}, bytes(41)), "belong to no part"),
        (body_of({"F32": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}, bytes(39)), "one after another"),
        (body_of({"F32": {"dtype": "F32", "shape": [-10], "data_offsets": [0, -40]}}), "one after another"),
        (body_of({"F32": {"dtype": "F32", "shape": [10], "data_offsets": [4, 44]}}, bytes(44)), "one after another"),
        (body_of({"F32": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]},
                  "G": {"dtype": "F32", "shape": [5], "data_offsets": [20, 40]}}, bytes(40)), "one after another"),
        (body_of({"F32": {"dtype": "F32", "shape": [2, 5], "data_offsets": [0, 40]}}, bytes(40)), "read"),
        (body_of({"F32": {"dtype": "F99", "shape": [10], "data_offsets": [0, 40]}}, bytes(40)), "read"),
        (body_of({"F32": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}), "one after another"),
        (body_of({"F32": {"dtype": "I32", "shape": [10], "data_offsets": [0, 40]}}, bytes(40)), "10 of I32"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_refused_with_a_sentence(body, words):
    header, _ = taken_apart(wire.encode_outcome(update()))
    with pytest.raises(wire.WireError) as refused:
        wire.decode_outcome(packed({**header, "body": {"bytes": len(body)}}, body))
    assert words in str(refused.value)


def test_bodies_that_claim_more_than_there_is_allocate_nothing():
    """A body whose own table promises a terabyte: refused, with no more memory than the message has."""
    body = body_of({"x": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}, bytes(64))
    header, _ = taken_apart(wire.encode_outcome(Failure("a", 1, "r", "d")))
    header["body"] = {"bytes": len(body)}
    tracemalloc.start()
    try:
        decode_either(packed(header, body))
        for claimed in (1 << 20, 1 << 31, 0xFFFFFFFF):
            decode_either(packed(header, body, length=claimed))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_header_that_is_too_long_is_not_read_and_not_sent():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "HEADER_BYTES", 1 << 30)
        message = wire.encode_assignment(assignment(recipe={"x": "y" * (8 << 20)}))
    with pytest.raises(wire.WireError, match="header claims"):
        wire.decode_assignment(message)
    with pytest.raises(wire.WireError, match="header"):
        wire.encode_assignment(assignment(recipe={"x": "y" * (8 << 20)}))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_at_all_raise_anything_else(data):
    for message in (data, wire.MAGIC + data, packed(data), packed({"message": "update"}, data)):
        decode_either(message)


def test_mutated_messages_raise_nothing_else():
    """With a digest that is right, so that the change is met by the reading itself."""
    draw = random.Random(5)
    message = wire.encode_outcome(update())[:-32]
    for _ in range(500):
        altered = bytearray(message)
        for _ in range(draw.randint(1, 4)):
            altered[draw.randrange(len(altered))] = draw.randrange(256)
        with contextlib.suppress(wire.WireError):
            wire.decode_outcome(bytes(altered) + hashlib.sha256(altered).digest())


def test_a_body_is_what_safetensors_reads():
    tensors = {
        "b": torch.arange(4.0),
        "a": torch.ones(2, 3),
        "n": torch.tensor([1, 2]),
        "e": torch.empty(0, 3),
        "s": torch.tensor(7.0),
    }
    _, body = taken_apart(wire.encode_outcome(Update("a", 1, Payload(tensors))))
    got = load(body)
    assert set(got) == {"F32", "I64"}
    assert got["F32"].tolist() == [1.0] * 6 + [0.0, 1.0, 2.0, 3.0, 7.0]
    assert got["I64"].tolist() == [1, 2]


def test_the_header_names_all_that_an_auditor_asks_for():
    header, body = taken_apart(wire.encode_outcome(update()))
    assert (header["version"], header["fields"]["round"], header["fields"]["client"]) == (2, 3, "client ü/1")
    assert header["table"] == {"F32": [["v", [4]], ["w", [2, 3]]]}
    assert (header["operators"], header["digest"], header["body"]) == ([], "sha256", {"bytes": len(body)})
