"""A payload as one file: what the digest covers, and a client's sections in one file."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save

from fedloom.messages.at_rest import (
    VERSION,
    DamagedFile,
    decode_state,
    encode_state,
    from_bytes,
    load_tensors,
    to_bytes,
)
from fedloom.messages.types import Payload

TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7, dtype=torch.int16), "none": torch.zeros(0, 2)}


def header(data: bytes) -> dict[str, str]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_the_file_says_version_metadata_and_digest():
    """The digest by its definition: names in order, each with type and shape, then its bytes."""
    by_hand = hashlib.sha256()
    for name, about in (("a", "torch.int16 []"), ("none", "torch.float32 [0, 2]"), ("w", "torch.float32 [2, 3]")):
        by_hand.update(f"{name} {about}\n".encode() + TENSORS[name].numpy().tobytes())
    about = header(to_bytes(Payload(TENSORS, {"n": [1, "x"]})))
    assert about == {"version": str(VERSION), "meta": '{"n": [1, "x"]}', "sha256": by_hand.hexdigest()}


@pytest.mark.parametrize(
    "altered",
    [
        {"w": TENSORS["w"].reshape(3, 2)},
        {"w": TENSORS["w"].view(torch.int32)},
        {"v": TENSORS["w"]},
        {"w": TENSORS["w"], "more": torch.zeros(0)},
        {},
    ],
    ids=["shape", "type", "name", "more", "less"],
)
def test_another_tensor_under_the_same_digest_is_damage(altered):
    about = header(to_bytes(Payload({"w": TENSORS["w"]})))
    assert from_bytes(save({"w": TENSORS["w"]}, metadata=about)).tensors.keys() == {"w"}
    with pytest.raises(DamagedFile, match="its tensors were altered"):
        from_bytes(save(altered, metadata=about))


@pytest.mark.parametrize("gone", ["meta", "sha256", "all"])
def test_a_file_of_somebody_else_is_damage(gone):
    about = header(to_bytes(Payload({"w": TENSORS["w"]})))
    left = None if gone == "all" else {k: v for k, v in about.items() if k != gone}
    with pytest.raises(DamagedFile, match="cannot be read"):
        from_bytes(save({"w": TENSORS["w"]}, metadata=left))
    with pytest.raises(DamagedFile, match="cannot be read"):  # metadata that no payload may have
        from_bytes(save({"w": TENSORS["w"]}, metadata={**about, "meta": '{"x": NaN}'}))


def test_what_is_written_does_not_follow_the_tensors():
    live = torch.ones(4, 6)
    data = to_bytes(Payload({"w": live.T[1:3], "tied": live, "window": live[1:3], "whole": live}))
    live.zero_()
    got = from_bytes(data).tensors
    assert {n: t.shape for n, t in got.items()} == {"w": (2, 4), "tied": (4, 6), "window": (2, 6), "whole": (4, 6)}
    assert all(bool((t == 1).all()) for t in got.values())


def test_what_operators_made_does_not_rest():
    with pytest.raises(AssertionError, match="decoded before it is stored"):
        to_bytes(Payload({}, {}, {"operators": []}))


def test_sections_come_back_with_their_own_tensors_and_metadata():
    state = {
        "personal": Payload({"a/b": torch.ones(2), "c": torch.zeros(1)}, {"k": 1}),
        "optimizer": Payload({"c": torch.full((3,), 2.0)}),
        "operators": Payload(),
        "hooks": Payload({}, {"seen": [1, 2]}),
    }
    got = decode_state(encode_state(state))
    assert {s: (set(p.tensors), p.meta) for s, p in got.items()} == {
        "personal": ({"a/b", "c"}, {"k": 1}),
        "optimizer": ({"c"}, {}),
        "operators": (set(), {}),
        "hooks": (set(), {"seen": [1, 2]}),
    }
    assert torch.equal(got["personal"].tensors["c"], torch.zeros(1))
    assert torch.equal(got["optimizer"].tensors["c"], torch.full((3,), 2.0))


def test_empty_state_is_no_file():
    assert encode_state({}) is None
    assert encode_state({"personal": Payload(), "optimizer": Payload()}) is None
    assert decode_state(None) == {}
    for some in (Payload({}, {"k": 0}), Payload({"t": torch.zeros(0)})):
        assert encode_state({"personal": Payload(), "optimizer": some}) is not None


def test_plain_tensor_files(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"w": TENSORS["w"]}))
    assert torch.equal(load_tensors(path)["w"], TENSORS["w"])
