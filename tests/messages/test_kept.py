"""What cannot be kept is refused when it is stored."""

from __future__ import annotations

import pytest
import torch

from fedloom.messages.kept import check_kept
from fedloom.messages.types import Payload


@pytest.mark.parametrize(
    ("tensors", "meta", "sentence"),
    [
        ({"m": [1.0]}, {}, r"tensors\['m'\], which is a list and no tensor: keep it in kept\.meta"),
        ({"m": torch.eye(2).to_sparse()}, {}, r"cannot be stored \(sparse_coo, float32 on cpu\)"),
        ({"m": torch.ones(1, device="meta")}, {}, "cannot be stored"),
        ({"": torch.ones(1)}, {}, "a string of 1 to 512 characters"),
        ({3: torch.ones(1)}, {}, "a string of 1 to 512 characters"),
        ({}, {"m": torch.ones(1)}, r"meta that cannot be kept \(.*is a Tensor.*tensors in kept\.tensors"),
        ({}, {"m": float("nan")}, "numbers must be finite"),
        ({}, {"m": "x" * 20_000}, "at most 16384"),
    ],
    ids=["list", "sparse", "meta", "no name", "number", "tensor in meta", "nan", "long"],
)
def test_what_cannot_be_kept_is_refused_with_a_sentence(tensors, meta, sentence):
    kept = Payload()
    kept.tensors, kept.meta = tensors, meta
    with pytest.raises(ValueError, match=f"^it has .*{sentence}"):
        check_kept(kept, "it")


def test_more_than_a_payload_may_hold_is_refused(monkeypatch):
    monkeypatch.setattr("fedloom.messages.limits.PAYLOAD_BYTES", 100)
    monkeypatch.setattr("fedloom.messages.limits.TENSORS", 2)
    check_kept(Payload({"a": torch.ones(25)}), "it")
    with pytest.raises(ValueError, match="it has 104 bytes, but at most 100 are kept"):
        check_kept(Payload({"a": torch.ones(25), "b": torch.ones(1)}), "it")
    with pytest.raises(ValueError, match="it has 3 tensors, but at most 2 are kept"):
        check_kept(Payload({n: torch.ones(1) for n in "abc"}), "it")
