from __future__ import annotations

import torch

from fedloom.messages.types import Payload
from fedloom.testing.compare import differing, flat, near, same, size


def test_payloads_are_the_same_with_the_same_names_numbers_and_metadata():
    one = Payload({"a": torch.ones(2)}, {"n": 1})
    assert same(one, Payload({"a": torch.ones(2)}, {"n": 1}))
    for other in (
        Payload({"a": torch.ones(2)}),
        Payload({"b": torch.ones(2)}, {"n": 1}),
        Payload({"a": torch.zeros(2)}, {"n": 1}),
    ):
        assert not same(one, other)


def test_numbers_are_near_up_to_rounding_and_only_in_one_shape():
    assert near(torch.ones(3), torch.ones(3) + 1e-7)
    assert not near(torch.ones(3), torch.ones(3) + 1e-3)
    assert not near(torch.ones(3), torch.ones(4))


def test_sizes_and_differences():
    payload = Payload({"b": torch.ones(2), "a": torch.zeros(1, dtype=torch.int8)})
    assert size(payload) == 9
    assert flat(payload).tolist() == [0, 1, 1]
    assert differing({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}) == ["b", "c"]
