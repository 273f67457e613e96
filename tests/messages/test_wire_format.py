"""docs/wire-format.md read literally: a second reader with nothing but json and struct, and a scan of what really travels."""

from __future__ import annotations

import hashlib
import json
import re
import struct

import pytest
import torch

from fedloom import run
from fedloom.messages import limits, wire
from fedloom.messages.operators.chain import Chain
from fedloom.messages.types import Assignment, Cost, Payload, Update
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "wire-format.md"


def read(message: bytes) -> tuple[dict, dict[str, tuple[str, bytes]]]:
    """Sections 1 to 3 of the page: (header, part → (dtype, bytes))."""
    assert message[:4] == b"FLM2"
    (length,) = struct.unpack("<I", message[4:8])
    header = json.loads(message[8 : 8 + length].decode("utf-8"))
    body, digest = message[8 + length : -32], message[-32:]
    assert hashlib.sha256(message[:-32]).digest() == digest
    assert header["version"] == 2 and header["body"]["bytes"] == len(body)
    (size,) = struct.unpack("<Q", body[:8])
    parts = {}
    for name, entry in json.loads(body[8 : 8 + size]).items():
        start, end = entry["data_offsets"]
        parts[name] = entry["dtype"], body[8 + size + start : 8 + size + end]
    return header, parts


def named(header: dict, flat: dict[str, list]) -> dict[str, tuple[list[int], list]]:
    """Section 4: name → (shape, numbers)."""
    found = {}
    for dtype, rows in header["table"].items():
        at = 0
        for name, shape in rows:
            count = 1
            for n in shape:
                count *= n
            found[name] = shape, flat[dtype][at : at + count]
            at += count
    return found


def numbers(data: bytes, code: str) -> list:
    return list(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))


TENSORS = {
    "b": torch.randn(300, generator=torch.Generator().manual_seed(1)), "a.weight": torch.arange(6.0).reshape(2, 3),
    "seeds": torch.tensor([2**62, -1]), "empty": torch.empty(0, 3), "on": torch.tensor(True),
}  # fmt: skip


def test_a_plain_message_is_read_with_json_and_struct():
    update = Update("a", 3, Payload(TENSORS, {"note": "é"}), 7, 70, {"loss": 1.5}, Cost(steps=4))
    header, parts = read(wire.encode_outcome(update))
    assert header["message"] == "update"
    assert header["fields"] == {
        "client": "a",
        "round": 3,
        "num_examples": 7,
        "num_tokens": 70,
        "metrics": {"loss": 1.5},
    }
    assert header["cost"]["steps"] == 4 and header["meta"] == {"note": "é"} and header["operators"] == []
    flat = {d: numbers(data, {"F32": "f", "I64": "q", "BOOL": "?"}[d]) for d, (_, data) in parts.items()}
    got = named(header, flat)
    assert set(got) == set(TENSORS)
    for name, (shape, values) in got.items():
        assert (shape, values) == (list(TENSORS[name].shape), TENSORS[name].flatten().tolist())


def test_a_quantised_message_is_read_with_json_and_struct():
    chain = Chain.parse([{"name": "quantize", "bits": 4}])
    header, parts = read(wire.encode_assignment(Assignment("train", "a", 1, 2, chain.encode(Payload(TENSORS)))))
    assert header["operators"] == [
        {"name": "quantize", "error_feedback": False, "bits": 4, "block": 256, "rounding": "nearest"}
    ]
    codes, scales = parts["F32.codes"][1], parts["F32.scales"][1]
    sizes = [struct.unpack("<f", b"\0\0" + scales[i : i + 2])[0] for i in range(0, len(scales), 2)]
    levels = [half - 7 for byte in codes for half in (byte % 16, byte // 16)]
    flat = {"F32": [level * sizes[i // 256] for i, level in enumerate(levels)], "I64": numbers(parts["I64"][1], "q"),
            "BOOL": numbers(parts["BOOL"][1], "?")}  # fmt: skip
    expected = chain.decode(chain.encode(Payload(TENSORS))).tensors
    for name, (shape, values) in named(header, flat).items():
        assert shape == list(expected[name].shape)
        assert values == pytest.approx(expected[name].flatten().tolist(), rel=1e-6)


def test_a_sparse_message_is_read_with_json_and_struct():
    chain = Chain.parse([{"name": "sparsify", "fraction": 0.02}])
    sent = Payload({"w": TENSORS["b"]})
    header, parts = read(wire.encode_assignment(Assignment("train", "a", 1, 2, chain.encode(sent))))
    values, place, flat = iter(numbers(parts["F32.values"][1], "f")), -1, [0.0] * 300
    for byte in parts["F32.index"][1]:
        place += byte
        if byte < 255:
            place += 1
            flat[place] = next(values)
    assert next(values, None) is None
    assert named(header, {"F32": flat})["w"][1] == chain.decode(chain.encode(sent)).tensors["w"].tolist()


def test_the_page_names_every_field_every_limit_and_every_operator():
    from fedloom.common import registry

    page = PAGE.read_text(encoding="utf-8")
    header, _ = read(wire.encode_outcome(Update("a", 1, Payload())))
    asked, _ = read(wire.encode_assignment(Assignment("train", "a", 1, 2, Payload())))
    for name in {*header, *header["fields"], *header["cost"], *asked["fields"], *registry.operators.names()}:
        assert f"`{name}`" in page, name
    stated = {n: v for n, v in vars(limits).items() if n.isupper()}
    for name, value in stated.items():
        assert re.search(rf"\| `{name}` \| {value} \|", page), name


#: How pickles of protocols 2 to 5 begin and what they all use: PROTO, FRAME; and the magics of torch's and numpy's files.
FORBIDDEN = [
    rb"\x80[\x02-\x05](\x95|c|\}|\]|\(|K|X|q)",
    rb"PK\x03\x04",
    rb"\x93NUMPY",
    rb"c__builtin__\n",
    rb"cbuiltins\n",
    rb"ctorch",
]


def test_traffic_of_a_run_holds_no_pickle(tiny_recipe, tmp_path, monkeypatch):
    """All that a run says: everything but the numbers themselves is JSON, and the numbers are as many as the table says."""
    seen: list[bytes] = []
    for name in ("encode_assignment", "encode_outcome"):
        encode = getattr(wire, name)

        def kept(value, *, encode=encode, **how):
            seen.append(encode(value))  # with its digest, which the simulator leaves out
            assert encode(value, **how)[:-32] == seen[-1][:-32]
            return encode(value, **how)

        monkeypatch.setattr(wire, name, kept)
    run(tiny_recipe({"operators.up": ["delta", "quantize"], "federation.rounds": 1}), tmp_path / "run")
    assert len(seen) >= 12
    for message in seen:
        header, parts = read(message)
        words = json.dumps(header).encode()
        assert not [p for p in FORBIDDEN if re.search(p, words)]
        assert sum(len(data) for _, data in parts.values()) + 8 <= header["body"]["bytes"]
        if header["operators"]:
            assert not [p for p in FORBIDDEN[1:] if re.search(p, b"".join(data for _, data in parts.values()))]
            assert {d for d, _ in parts.values()} == {"U8", "I16"}
        else:
            assert all(dtype == name for name, (dtype, _) in parts.items())


def test_the_scan_finds_what_it_looks_for():
    import io
    import pickle

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    saved = io.BytesIO()
    torch.save({"w": torch.ones(1)}, saved)
    for foreign in (
        pickle.dumps({"a": 1}),
        pickle.dumps([1, 2]),
        pickle.dumps("x"),
        buffer.getvalue(),
        saved.getvalue(),
    ):
        assert [p for p in FORBIDDEN if re.search(p, foreign)], foreign[:20]


# ------------------------------------------------------------------ what a second writer could get wrong


def body(head: object, data: bytes = b"", size: int | None = None) -> memoryview:
    text = json.dumps(head).encode()
    return memoryview(struct.pack("<Q", len(text) if size is None else size) + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (memoryview(b""), "shorter than its own header"),
        (memoryview(b"1234567"), "shorter than its own header"),
        (body({}, size=3), "claims more bytes than the body has"),
        (body([]), "the body's header is no mapping"),
        (body({"F32": ENTRY}, bytes(7)), "do not lie one after another"),
        (body({"F32": ENTRY}, bytes(9)), "bytes that belong to no part"),
        (body({}, bytes(1)), "bytes that belong to no part"),
        (body({"F32": {**ENTRY, "shape": [3]}}, bytes(8)), "do not lie one after another"),
        (body({"F32": {**ENTRY, "shape": [-2]}}, bytes(8)), "do not lie one after another"),
        (body({"F32": {**ENTRY, "shape": [2.0]}}, bytes(8)), "do not lie one after another"),
        (body({"F32": {**ENTRY, "data_offsets": [1, 9]}}, bytes(9)), "do not lie one after another"),
        (body({"F32": ENTRY, "I8": {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]}}, bytes(8)), "do not lie"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_body_that_is_not_as_the_page_says_is_refused(made, sentence):
    with pytest.raises(wire.WireError, match=sentence):
        wire._parts(made)


def test_a_body_as_the_page_says():
    assert wire._parts(body({})) == {}
    head = {
        "F32": ENTRY,
        "I8": {"dtype": "I8", "shape": [3], "data_offsets": [8, 11]},
        "U8": {"dtype": "U8", "shape": [0], "data_offsets": [11, 11]},
    }
    found = wire._parts(body(head, struct.pack("<2f", 1.5, -2.0) + b"abc"))
    assert {n: (dtype, count, bytes(data)) for n, (dtype, count, data) in found.items()} == {
        "F32": (torch.float32, 2, struct.pack("<2f", 1.5, -2.0)), "I8": (torch.int8, 3, b"abc"), "U8": (torch.uint8, 0, b""),
    }  # fmt: skip


@pytest.mark.parametrize("fields", [[], None, "text", 3])
def test_the_fields_of_a_message_are_a_mapping(fields):
    message = wire.encode_outcome(Update("a", 1, Payload()))
    header = json.loads(wire.split(message).start[8:])
    start = json.dumps({**header, "fields": fields}).encode()
    altered = b"FLM2" + struct.pack("<I", len(start)) + start + bytes(wire.split(message).body)
    with pytest.raises(
        wire.WireError, match=f"the fields of a message are a {type(fields).__name__} and not a mapping"
    ):
        wire.decode_outcome(altered + hashlib.sha256(altered).digest())


def test_a_message_in_three_pieces_has_the_bytes_of_the_whole():
    message = wire.encode_outcome(Update("a", 1, Payload(TENSORS)))
    pieces = wire.split(message)
    assert pieces.total == len(message)
    assert pieces.start + bytes(pieces.body) + pieces.digest == message
    assert len(pieces.digest) == 32
    smallest = b"FLM2" + struct.pack("<I", 0) + bytes(32)
    assert wire.split(smallest).total == 40
    for short in (smallest[:-1], smallest[:7], b"", b"FLM1" + smallest[4:]):
        with pytest.raises(wire.WireError):
            wire.split(short)
