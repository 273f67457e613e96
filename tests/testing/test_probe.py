"""Fingerprints tell data that changed, in whatever it lies, and leave out what is no data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedloom.algorithms import FedAvg
from fedloom.messages.types import Payload
from fedloom.testing.probe import Log, fingerprints, probe


@dataclass
class Note:
    values: list


def test_a_changed_value_has_another_fingerprint_wherever_it_lies():
    def state(x: float) -> dict[str, object]:
        tensor = torch.tensor([1.0, x])
        return {
            "tensor": tensor, "number": x, "numbers": np.array([x]), "nested": {"a": [tensor]}, "note": Note([x]),
            "kept": Payload({"t": tensor}, {"x": x}), "names": {"b", str(x)},
        }  # fmt: skip

    one, again, other = (fingerprints(state(x)) for x in (1.0, 1.0, 2.0))
    assert one == again
    assert {n for n in one if one[n] != other[n]} == set(state(1.0))


def test_models_functions_and_what_every_algorithm_has_are_left_out():
    assert fingerprints({"net": torch.nn.Linear(1, 1), "f": len, "round": 3, "model": 1, "x": 1}).keys() == {"x"}


def test_a_probe_is_taken_for_the_class_itself():
    made = probe(FedAvg, Log())
    assert issubclass(made, FedAvg)
    assert (made.__name__, made.properties, made.strategies()) == ("FedAvg", FedAvg.properties, FedAvg.strategies())
    assert made.initial_payload is FedAvg.initial_payload  # overriding it would change what a client gets first
