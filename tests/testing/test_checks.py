"""Each check of every algorithm names what is wrong, in a sentence that says how to fix it."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms import FedAvg
from fedloom.messages import Payload
from fedloom.models import Layout
from tests.helpers.broken import ADAPTER, ClientAttribute, Momentum, problems

# ------------------------------------------------------------------ state


class ServerAttribute(FedAvg):
    about = ADAPTER
    momentum: torch.Tensor | float = 0.0

    def aggregate(self, updates):
        before = self.shared.flat.clone()
        super().aggregate(updates)
        self.momentum = self.shared.flat - before + 0.5 * self.momentum
        self.shared.copy_(before + self.momentum)
        return {}


class ServerDict(FedAvg):
    about = ADAPTER

    def server_model(self, models):
        self.seen: dict[str, int] = {}
        return super().server_model(models)

    def aggregate(self, updates):
        metrics = super().aggregate(updates)
        self.seen["rounds"] = self.seen.get("rounds", 0) + 1
        self.shared.flat.mul_(1 + 1 / self.seen["rounds"])
        return metrics


class KeptLeftOut(Momentum):
    about = Momentum.about

    def server_state(self) -> Payload:
        return Payload({f"shared/{n}": t for n, t in self.shared.tensors().items()})


@pytest.mark.parametrize(
    ("cls", "named"),
    [
        (ServerAttribute, "self.momentum in round 1"),
        (ServerDict, "self.seen in round 1"),
        (KeptLeftOut, "self.kept did not"),
    ],
)
def test_state_of_the_server_that_a_resumed_run_loses_is_named(cls, named):
    (sentence,) = problems(cls, ["resume"])
    assert sentence.startswith("a run that was killed in round 2 and resumed differs from a whole one in ")
    assert named in sentence
    assert "self.kept" in sentence


def test_state_that_one_client_leaves_for_the_next_is_named_and_what_is_set_anew_is_not():
    (sentence,) = problems(ClientAttribute, ["client state"])
    assert sentence.startswith("the client half remembers self.owed from one client's training to the next one's")
    assert "self.start" not in sentence
    assert "Keep it in self.kept" in sentence


def test_what_cannot_be_kept_ends_the_first_run_with_its_sentence():
    class Listing(FedAvg):
        about = ADAPTER

        def server_step(self) -> None:
            self.kept.tensors["rounds"] = [1]

    (sentence,) = problems(Listing, ["resume"])
    assert "self.kept of Listing has tensors['rounds'], which is a list and no tensor: keep it in kept.meta" in sentence


# ------------------------------------------------------------------ updates


def test_an_update_that_is_not_what_the_layout_says_is_named_with_both_shapes():
    class Halved(FedAvg):
        about = ADAPTER

        def update_layout(self):
            return Layout({"half": (self.shared.layout.numel // 2,)})

        def shared_state(self) -> Payload:
            return Payload({"half": self.model.adapter.flat[:7].clone()})

    (sentence,) = problems(Halved, ["layout"])
    assert "shared_state() sent half (7,), and update_layout() says half (" in sentence
    assert sentence.endswith("make the two agree")


def test_updates_that_must_be_refused_and_are_not_are_named():
    class Trusting(FedAvg):
        about = ADAPTER

        def accept(self, update) -> None:
            self.shared.flat[0] += 1

    sentences = problems(Trusting, ["refusals"])
    wanted = (
        "a tensor of a foreign name",
        "an update without ",
        "has another shape",
        "an update with nan",
        "changed the server's",
    )
    assert all(any(w in s for s in sentences) for w in wanted)


def test_global_randomness_is_named():
    class Noisy(FedAvg):
        about = ADAPTER

        def server_step(self) -> None:
            self.shared.flat.add_(0.01 * torch.randn(self.shared.layout.numel))

    (sentence,) = problems(Noisy, ["repeatable"])
    assert "two runs with one seed differ in adapter" in sentence
    assert "torch_generator(self.seed" in sentence


def test_a_class_without_words_of_its_own_is_told_how_to_give_them():
    class Silent(FedAvg):
        pass

    (sentence,) = problems(Silent, ["words"])
    assert "the class has no `about` of its own" in sentence
