"""What an algorithm declares and does not do is named."""

from __future__ import annotations

import pytest

from fedloom.algorithms import About, FedAvg, Properties
from fedloom.models import WeightedMean
from tests.helpers.broken import ADAPTER, ClientAttribute, problems


class Last(FedAvg):
    about = ADAPTER
    properties = Properties(linear_sum=True)

    def aggregate(self, updates):
        *_, last = updates
        self.shared.load(last.payload.tensors)
        return {}


class First(Last):
    about = ADAPTER

    def aggregate(self, updates):
        first, *_ = updates
        self.shared.load(first.payload.tensors)
        return {}


class Everything(FedAvg):
    about = ADAPTER
    properties = Properties(streams=True, order_independent=True)

    def aggregate(self, updates):
        held, mean = list(updates), WeightedMean(self.shared.layout)
        for update in held:
            mean.add(update.payload.tensors, update.num_examples)
        self.shared.copy_(mean.result())
        return {}


class Claiming(FedAvg):
    about = About("averaging", "the adapter, in both directions", "Someone, 2020", up=lambda s: 8, server=lambda s: 0)
    properties = Properties(mixed_ranks=True, personal=True, neutral={})

    def aggregate(self, updates):
        metrics = super().aggregate(updates)
        self.shared.flat.mul_(0.5)
        return metrics


@pytest.mark.parametrize(
    ("cls", "check", "parts"),
    [
        (Last, "order", ["another result for the same updates in another order", "set order_independent=False"]),
        (First, "linear sum", ["replaced by their mean", "set linear_sum=False"]),
        (Everything, "streams", ["still holds an update", "set streams=False"]),
        (
            Claiming,
            "words",
            ["'the adapter, in both directions' (31 characters), but tables have room for 26: shorten it"],
        ),
        (Claiming, "words", ["about.paper is 'Someone, 2020'"]),
        (Claiming, "costs", ["about.up says 8 bytes in round 1, but "]),
        (Claiming, "costs", ["about.server says 0 bytes after round 1, but the server's state has "]),
        (Claiming, "mixed ranks", ["a client of rank 1 sends ", "leave mixed_ranks out"]),
        (Claiming, "personal", ["properties.personal is true, but no client keeps a tensor"]),
        (Claiming, "neutral", ["does not end with the bits of plain local training"]),
    ],
    ids=lambda v: getattr(v, "__name__", v if isinstance(v, str) else ""),
)
def test_what_is_declared_and_not_so_is_named(cls, check, parts):
    sentences = problems(cls, [check])
    assert any(all(p in s for p in parts) for s in sentences), sentences


def test_a_cohort_that_sends_something_else_is_named():
    """Alone a client gets what the one before it left; in a cohort each has an object of its own."""
    (sentence,) = problems(ClientAttribute, ["cohorts"])
    assert "with train.cohort=3 client " in sentence
