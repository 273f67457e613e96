"""Kinds of tensors in one payload, told apart by a prefix."""

from __future__ import annotations

import torch

from fedloom.messages.names import prefixed, under, without
from fedloom.messages.types import Payload


def test_a_kind_comes_out_as_it_went_in_and_the_rest_stays():
    own, other = {"a": 1, "b.control/": 2}, {"a": 3, "controls": 4}
    together = {**prefixed(own, "control/"), **other}
    assert under(together, "control/") == own
    assert without(together, "control/") == other
    assert list(under({**prefixed({"z": 1, "a": 2}, "x/")}, "x/")) == ["z", "a"], "in the order of the payload"
    assert without({"x/a": 1, "y/a": 2, "a": 3}, "x/", "y/") == {"a": 3}


def test_only_the_first_prefix_is_taken_off():
    assert under({"x/x/a": 1}, "x/") == {"x/a": 1}


def test_a_payload_gives_its_tensors_and_not_copies():
    tensor = torch.zeros(2)
    payload = Payload({"x/a": tensor, "b": torch.ones(1)})
    assert payload.under("x/")["a"] is tensor
    assert list(payload.without("x/")) == ["b"]
