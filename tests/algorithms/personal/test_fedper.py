"""FedPer and FedRep: the private part stays, bit for bit; FedRep trains one part at a time."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.personal.fedper import last_layers
from fedloom.common.errors import UserError
from fedloom.messages.types import Failure
from tests.helpers.federation import Federation

NAMES = ("fedper", "fedrep")


def federation(recipe, folder, name, more=None, **options):
    return Federation(recipe({"algorithm": {"name": name, **options}, **(more or {})}), folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_private_part_never_travels(tiny_recipe, tmp_path, name):
    """By name, and by value: not the numbers that a client keeps, nor those that the seed made, under another name."""
    f = federation(tiny_recipe, tmp_path, name)
    f.round(1)
    f.round(2)
    assert {n.split(".layers.")[1][0] for n in f.server.private} == {"1"}
    kept = [f.model.adapter.layout.views(f.evaluated(c, 2))[n] for c in f.clients for n in f.server.private]
    sums = {float(t.double().sum()) for t in kept if t.any()}
    assert len(sums) > len(f.server.private)  # clients differ
    for message in f.messages:
        for payload in (message.down, message.up):
            for n, tensor in (payload.tensors if payload else {}).items():
                assert n not in f.server.private
                assert float(tensor.double().sum()) not in sums
    both = set(f.server.shared.views) | f.server.private
    assert both == set(f.model.adapter.views)


@pytest.mark.parametrize("name", NAMES)
def test_a_client_gets_its_own_part_back_with_the_new_shared_part(tiny_recipe, tmp_path, name):
    f = federation(tiny_recipe, tmp_path, name)
    f.round(1)
    ends = {}
    for client in f.clients:
        f.evaluate(client, 1)
        for n, tensor in f.model.adapter.views.items():
            if n in f.server.private:
                ends.setdefault(n, []).append(tensor.clone())
            else:
                assert torch.equal(tensor, f.server.shared.views[n])
    assert any(not torch.equal(a, b) for a, b, _ in ends.values())
    initial = f.model.initial_adapter()
    assert any(not torch.equal(t[0], initial.views[n]) for n, t in ends.items())


def test_one_client_of_fedper_is_plain_training(tiny_recipe, tmp_path):
    keep = {"train.optimizer_state": "keep", "train.schedule": "constant"}
    plain = Federation(tiny_recipe(keep), tmp_path / "fedavg")
    personal = federation(tiny_recipe, tmp_path / "fedper", "fedper", keep)
    for number in (1, 2, 3):
        plain.round(number, ["copy"])
        personal.round(number, ["copy"])
    assert torch.equal(personal.evaluated("copy", 3), plain.evaluated("copy", 3))


def test_fedper_trains_both_parts_in_the_same_steps(tiny_recipe, tmp_path):
    """The first round's shared update is FedAvg's: gradients of both parts were taken together."""
    plain = Federation(tiny_recipe(), tmp_path / "fedavg").train("copy", 1)
    personal = federation(tiny_recipe, tmp_path / "fedper", "fedper").train("copy", 1)
    assert personal.payload.tensors
    assert all(torch.equal(t, plain.payload.tensors[n]) for n, t in personal.payload.tensors.items())


def test_fedrep_trains_the_private_part_first_and_one_part_at_a_time(tiny_recipe, tmp_path):
    """Weight decay and clipping on: the part that is not trained stays bit for bit all the same."""
    f = federation(tiny_recipe, tmp_path, "fedrep", {"train.steps": 5, "train.weight_decay": 0.1}, private_steps=0.4)
    algorithm = type(f.server)
    moved: list[set[str]] = []
    last = {n: t.clone() for n, t in f.model.adapter.views.items()}

    def watch(self, model):
        now = {n: t.clone() for n, t in model.adapter.views.items()}
        moved.append({n for n in now if not torch.equal(now[n], last[n])})
        last.update(now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm, "before_step", lambda s, m: watch(s, m))  # sees what the step before it did
        f.train("copy", 1)
    watch(None, f.model)
    private, shared = moved[1:3], moved[3:]  # 2 of 5 steps, then 3
    assert len(moved) == 6 and not moved[0]
    assert all(step and step <= f.server.private for step in private)
    assert all(step and not step & f.server.private for step in shared)


def test_fedrep_costs_what_fedavg_costs(tiny_recipe, tmp_path):
    plain = Federation(tiny_recipe({"train.steps": 5}), tmp_path / "fedavg").train("copy", 1).cost
    f = federation(tiny_recipe, tmp_path / "fedrep", "fedrep", {"train.steps": 5})
    cost = f.train("copy", 1).cost
    assert (cost.steps, cost.train_tokens, cost.train_flops) == (plain.steps, plain.train_tokens, plain.train_flops)


def test_the_two_optimisers_of_fedrep_are_kept_apart(tiny_recipe, tmp_path):
    """Kept moments: each part's count its own steps, and what belongs to the other part is zero in them."""
    f = federation(
        tiny_recipe, tmp_path, "fedrep", {"train.steps": 5, "train.optimizer_state": "keep"}, private_steps=0.4
    )
    f.train("copy", 1)
    f.train("copy", 2)
    state = f.store.load("copy", 2)["optimizer"].tensors
    assert set(state) == {f"{p}/{n}" for p in ("private", "shared") for n in ("step", "exp_avg", "exp_avg_sq")}
    assert (int(state["private/step"]), int(state["shared/step"])) == (4, 6)
    views = {part: f.model.adapter.layout.views(state[f"{part}/exp_avg"]) for part in ("private", "shared")}
    for n in f.model.adapter.views:
        other = "shared" if n in f.server.private else "private"
        assert not views[other][n].any()


def test_fedrep_needs_two_steps_of_a_clients_epochs(tiny_recipe, tmp_path):
    f = federation(tiny_recipe, tmp_path, "fedrep", {"train.steps": None, "train.epochs": 1, "train.batch_size": 64})
    outcome = f.send(f.assignment("train", "copy", 1))
    assert isinstance(outcome, Failure) and "this client's epochs are one step" in outcome.detail


def test_which_layers_are_the_last():
    names = [f"base_model.model.model.layers.{i}.q_proj.lora_A.weight" for i in range(12)] + ["model.embed.weight"]
    assert last_layers(names, 2) == frozenset(names[10:12])
    assert last_layers(names, 0.25) == frozenset(names[9:12])
    assert last_layers(names, 0.01) == frozenset(names[11:12])
    for without in ("prompt_embeddings", "prompt_encoder.mlp_head.2.weight"):
        with pytest.raises(UserError, match=r"algorithm\.private"):
            last_layers([without], 1)


@pytest.mark.parametrize("private", ["layers.1.*q_proj", "lora_B"])
def test_the_private_part_by_name(tiny_recipe, tmp_path, private):
    f = federation(tiny_recipe, tmp_path, "fedper", private=private)
    part = private.split("*")[-1].removeprefix(".")
    assert f.server.private and all(part in n for n in f.server.private)
    f.round(1)


@pytest.mark.parametrize(
    "options",
    [{"private": "nowhere"}, {"private": "."}, {"private_layers": 2}, {"private": "("}, {"private_layers": 1.5}],
)
def test_a_split_that_leaves_nothing_is_refused(tiny_recipe, tmp_path, options):
    with pytest.raises(UserError, match=r"algorithm\.private"):
        federation(tiny_recipe, tmp_path, "fedper", **options)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_that_holds_the_private_part_is_refused(tiny_recipe, tmp_path, name):
    f = federation(tiny_recipe, tmp_path, name)
    update = f.train("copy", 1)
    update.payload.tensors[next(iter(f.server.private))] = torch.zeros(1)
    with pytest.raises(ValueError, match="unexpected"):
        f.server.accept(update)
