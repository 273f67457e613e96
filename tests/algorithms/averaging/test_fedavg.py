"""FedAvg's oracles: the 1:3 mean, and one step of everybody as one step of all data."""

from __future__ import annotations

import json

import pytest
import torch

import fedloom
from fedloom.common import registry
from fedloom.data.batching import Plan, collate, round_indices
from fedloom.data.corpus import Partition, Shard
from fedloom.experiment.prepare import Setting, prepare
from fedloom.federation import workplace
from fedloom.federation.watch import Watch
from fedloom.messages.at_rest import load_tensors
from fedloom.messages.types import Payload, Update
from fedloom.recipe.recipe import AdapterConfig
from fedloom.training.trainer import fit
from tests.helpers import tiny


def fedavg(**options):
    cls = registry.algorithms.get("fedavg")
    return cls(cls.Options(**options), 0, AdapterConfig())


def split_as(monkeypatch, sizes: dict[str, int]) -> None:
    """Clients with these many training examples, one after another in the corpus, and two test examples each."""

    def partition(corpus, split, seed) -> Partition:
        shards, at = {}, 0
        for client, size in sizes.items():
            shards[client] = Shard(tuple(range(at, at + size)), (), (at + size, at + size + 1))
            at += size + 2
        assert at <= len(corpus.examples)
        return Partition(shards, "uniform", seed)

    monkeypatch.setattr(workplace, "partition", partition)


def trained_alone(setting: Setting, client: str, plan: Plan, indices=None) -> torch.Tensor:
    """Plain local training from the start of the run, without the federation: [numel]."""
    model, train = setting.model, setting.recipe.train
    model.adapter.copy_(model.initial)
    data = setting.data.sequences
    chosen = indices or setting.data.client(client).train
    steps = [
        [collate([data[i] for i in p], packed=True, pad=0, examples=p) for p in passes]
        for passes in round_indices(chosen, plan, 1, setting.recipe.seed, client)
    ]
    fit(model, fedavg(), steps, train, first_step=0, total_steps=len(steps))
    return model.adapter.flat.clone()


def end_of(folder) -> torch.Tensor:
    tensors = load_tensors(folder / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensors[n].flatten() for n in sorted(tensors)])


def test_clients_of_one_and_three_examples_give_the_one_to_three_mean(tiny_recipe, tmp_path, monkeypatch):
    split_as(monkeypatch, {"small": 1, "large": 3})
    recipe = tiny_recipe({"train.steps": 3, "federation.rounds": 1})
    fedloom.run(recipe, out=tmp_path / "run")
    setting = prepare(recipe, Watch())
    plan = Plan(2, steps=3)
    small, large = (trained_alone(setting, c, plan).double() for c in ("small", "large"))
    assert torch.equal(end_of(tmp_path / "run"), ((small + 3 * large) / 4).float())
    assert not torch.allclose(small, large)


@pytest.mark.parametrize(("weight_by", "weights"), [("examples", (1, 3)), ("tokens", (50, 10))])
def test_the_weight_is_examples_or_tokens_and_never_steps(weight_by, weights):
    algorithm = fedavg(weight_by=weight_by)
    model = type("Models", (), {"adapted": lambda self: fake_model()})()
    algorithm.server_model(model)
    one = Update("a", 1, Payload({"w": torch.tensor([1.0])}), num_examples=1, num_tokens=50)
    two = Update("b", 1, Payload({"w": torch.tensor([2.0])}), num_examples=3, num_tokens=10)
    metrics = algorithm.aggregate(iter([one, two]))
    expected = (weights[0] + 2 * weights[1]) / sum(weights)
    assert float(algorithm.shared.flat) == pytest.approx(expected)
    assert metrics["distance_moved"] == pytest.approx(expected)


def fake_model():
    from fedloom.models.layout import Adapter, Layout

    adapter = Adapter(Layout({"w": (1,)}))
    return type("Model", (), {"initial_adapter": lambda self: adapter.snapshot()})()


FULL_BATCH = {
    "train.steps": None,
    "train.epochs": 1,
    "train.batch_size": 64,
    "train.optimizer": "sgd",
    "train.lr": 2.0,
    "train.schedule": "constant",
    "train.clip": None,
    "federation.rounds": 1,
}


def centralised(setting: Setting) -> torch.Tensor:
    """One SGD step over all clients' training data at once, from transformers' own loss of each sequence alone."""
    model, data = setting.model, setting.data
    model.adapter.copy_(model.initial)
    model.grad.zero_()
    indices = [i for c in data.partition.training_clients for i in data.client(c).train]
    total = sum(data.sequences[i].supervised for i in indices)
    model.causal_lm.config._attn_implementation = "eager"
    for i in indices:
        ids = torch.tensor(data.sequences[i].ids.astype("int64"))[None]
        labels = ids.clone()
        labels[0, : data.sequences[i].prompt] = -100
        (model.module(input_ids=ids, labels=labels).loss * data.sequences[i].supervised / total).backward()
    return model.initial - 2.0 * model.grad


@pytest.mark.parametrize("weight_by", ["tokens", "examples"])
def test_one_full_batch_step_of_each_client_is_one_centralised_step(tiny_recipe, tmp_path, weight_by):
    """A client's loss is a mean over its tokens, so the weights that add up to one centralised step are its tokens."""
    recipe = tiny_recipe({**FULL_BATCH, "algorithm.weight_by": weight_by})
    result = fedloom.run(recipe, out=tmp_path / "run")
    assert result.summary["cost"]["steps"] == 3
    setting = prepare(recipe, Watch())
    expected, end = centralised(setting), end_of(tmp_path / "run")
    apart = float((end - expected).norm() / (expected - setting.model.initial).norm())
    if weight_by == "tokens":
        assert apart < 1e-5
    else:  # the control: with answers of different lengths it is another step
        assert 0.01 < apart < 0.5


def test_where_answers_are_equally_long_examples_are_as_good_a_weight(tiny_recipe, tmp_path):
    rows = [{**row, "output": f"{i:04d}"} for i, row in enumerate(tiny.rows(40))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe({**FULL_BATCH, "data.path": str(path)})
    fedloom.run(recipe, out=tmp_path / "run")
    setting = prepare(recipe, Watch())
    expected, end = centralised(setting), end_of(tmp_path / "run")
    assert float((end - expected).norm() / (expected - setting.model.initial).norm()) < 1e-5


def test_every_client_starts_a_round_from_the_mean(tiny_recipe, tmp_path, monkeypatch):
    """Two rounds by hand: the second starts where the first one's mean stands."""
    split_as(monkeypatch, {"a": 4, "b": 6})
    recipe = tiny_recipe({"train.schedule": "constant", "train.steps": 2})
    fedloom.run(recipe, out=tmp_path / "run")
    setting = prepare(recipe, Watch())
    model, data = setting.model, setting.data
    shared = model.initial.clone()
    for round in (1, 2):
        ends = {}
        for client in ("a", "b"):
            model.adapter.copy_(shared)
            steps = [
                [collate([data.sequences[i] for i in p], packed=True, pad=0, examples=p) for p in passes]
                for passes in round_indices(data.client(client).train, Plan(2, steps=2), round, recipe.seed, client)
            ]
            fit(model, fedavg(), steps, recipe.train, first_step=2 * (round - 1), total_steps=4)
            ends[client] = model.adapter.flat.double().clone()
        shared = ((4 * ends["a"] + 6 * ends["b"]) / 10).float()
    assert torch.equal(end_of(tmp_path / "run"), shared)
