"""The two baselines: `local` sends nothing at all, `global` is plain fine-tuning on everybody's data."""

from __future__ import annotations

import json

import pytest
import torch

import fedloom
from fedloom.common import registry
from fedloom.data.batching import Plan, collate, round_indices
from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch
from fedloom.messages import wire
from fedloom.messages.at_rest import load_tensors
from fedloom.messages.types import Update
from fedloom.training.trainer import fit


def plain(setting, indices, client: str, steps_per_round: int, rounds: int, keep: bool = False) -> torch.Tensor:
    """Fine-tuning without a federation: rounds one after the other on the same data, [numel]."""
    cls = registry.algorithms.get("fedavg")
    model, recipe = setting.model, setting.recipe
    model.adapter.copy_(model.initial)
    state = None
    for round in range(1, rounds + 1):
        plan = Plan(recipe.train.batch_size, steps=steps_per_round)
        steps = [
            [collate([setting.data.sequences[i] for i in p], packed=True, pad=0, examples=p) for p in passes]
            for passes in round_indices(indices, plan, round, recipe.seed, client)
        ]
        done = fit(
            model,
            cls(cls.Options(), 0, recipe.adapter),
            steps,
            recipe.train,
            first_step=(round - 1) * steps_per_round,
            total_steps=rounds * steps_per_round,
            optimizer_state=state,
        )
        state = done.optimizer_state if keep else None
    return model.adapter.flat.clone()


def flat(path) -> torch.Tensor:
    tensors = load_tensors(path / "adapter_model.safetensors")
    return torch.cat([tensors[n].flatten() for n in sorted(tensors)])


# ------------------------------------------------------------------ local


def test_local_is_each_client_alone_for_rounds_times_steps(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"algorithm": "local", "federation.rounds": 3})
    result = fedloom.run(recipe, out=tmp_path / "run")
    setting = prepare(recipe, Watch())
    ends = []
    for client in ("copy", "last", "upper"):
        end = flat(tmp_path / "run" / "adapters" / client)
        assert torch.equal(end, plain(setting, setting.data.client(client).train, client, 2, 3))
        ends.append(end)
    assert not torch.allclose(ends[0], ends[1])
    assert result.summary["cost"]["steps"] == 3 * 3 * 2


def test_under_local_nothing_travels(tiny_recipe, tmp_path, monkeypatch):
    tensors: list[str] = []
    assignment, outcome = wire.encode_assignment, wire.encode_outcome
    monkeypatch.setattr(
        wire, "encode_assignment", lambda a, **how: tensors.extend(a.payload.tensors) or assignment(a, **how)
    )
    monkeypatch.setattr(
        wire,
        "encode_outcome",
        lambda o, **how: (tensors.extend(o.payload.tensors) if isinstance(o, Update) else None) or outcome(o, **how),
    )
    result = fedloom.run(tiny_recipe({"algorithm": "local"}), out=tmp_path / "run")
    assert tensors == []
    messages = 3 * (2 + 3) + 3 + 3  # train, evaluate (0, 1, 2), pooled, save
    assert result.summary["cost"]["upload_bytes"] < 700 * messages
    assert result.summary["adapter"]["bytes"] > 5000


def test_local_models_are_measured_on_everybodys_test_data(tiny_recipe, tmp_path):
    """What other settings are compared with: the mean over clients of each one's loss on the pooled test set."""
    from fedloom.evaluation.loss import loss_sums

    recipe = tiny_recipe({"algorithm": "local", "train.lr": 0.05})
    result = fedloom.run(recipe, out=tmp_path / "run")
    setting = prepare(recipe, Watch())
    pooled, losses, own = setting.data.pooled().test, [], {}
    for client in ("copy", "last", "upper"):
        setting.model.adapter.copy_(flat(tmp_path / "run" / "adapters" / client))
        total, tokens = loss_sums(setting.model, setting.data.sequences, pooled, batch_size=24, packed=True)
        losses.append(total / tokens)
        test = setting.data.client(client).test
        total, tokens = loss_sums(setting.model, setting.data.sequences, test, batch_size=24, packed=True)
        own[client] = total / tokens
    assert len(pooled) == 12
    assert result.summary["loss"]["after"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    per_client = {c: v["loss"]["after"] for c, v in result.summary["per_client"].items()}
    assert per_client == pytest.approx(own, rel=1e-6)


# ------------------------------------------------------------------ global


def test_global_is_plain_fine_tuning_on_the_pool(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"algorithm": "global"})
    result = fedloom.run(recipe, out=tmp_path / "run")
    setting = prepare(recipe, Watch())
    pool = sorted(i for shard in setting.found.clients.shards.values() for i in shard.train)
    assert len(pool) == 45
    assert result.summary["cost"]["steps"] == 2 * 2 * 3  # rounds × steps × clients
    assert torch.equal(flat(tmp_path / "run" / "adapter"), plain(setting, pool, "all-clients", 6, 2))
    assert result.summary["clients"] == 3
    assert set(result.summary["per_client"]) == {"copy", "last", "upper"}


def test_global_takes_the_steps_of_the_clients_that_a_round_samples(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"algorithm": "global", "federation.clients_per_round": 2, "federation.min_clients": 2})
    result = fedloom.run(recipe, out=tmp_path / "run")
    assert result.summary["cost"]["steps"] == 2 * 2 * 2


def test_global_counts_epochs_over_the_pool(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"algorithm": "global", "train.epochs": 1, "train.batch_size": 15})
    result = fedloom.run(recipe, out=tmp_path / "run")
    assert result.summary["cost"]["steps"] == 2 * 3  # 45 examples in steps of 15


def test_global_with_one_client_is_fedavg_with_one_client(tiny_recipe, tmp_path):
    """And both are plain fine-tuning; only the pool's name, and so its order of batches, is another."""
    values = {"split.splitter": "uniform", "split.num_clients": 1, "train.optimizer_state": "keep"}
    recipe = tiny_recipe({"algorithm": "global", **values})
    fedloom.run(recipe, out=tmp_path / "run")
    setting = prepare(recipe, Watch())
    pool = setting.data.client("all-clients").train
    assert torch.equal(flat(tmp_path / "run" / "adapter"), plain(setting, pool, "all-clients", 2, 2, keep=True))


def test_both_are_scored_on_the_same_pooled_test_set(tiny_recipe, tmp_path):
    befores = []
    for name in ("fedavg", "global", "local"):
        fedloom.run(tiny_recipe({"algorithm": name}), out=tmp_path / name)
        befores.append(json.loads((tmp_path / name / "summary.json").read_text())["loss"]["before"])
    assert befores[0] == befores[1] == befores[2]
