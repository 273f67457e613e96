"""`train.cohort` in whole runs: what it is refused for, what is written down, what it costs, and what survives a kill."""

from __future__ import annotations

import json

import pytest
import torch

import fedloom
from fedloom.common.errors import UserError
from fedloom.experiment.prepare import prepare
from fedloom.federation import cohorts
from fedloom.federation.checks import check_recipe
from fedloom.federation.watch import Watch
from fedloom.messages.at_rest import load_tensors
from fedloom.training.cohort import Cohort
from tests.helpers import preferences

#: At this ε rounding stays rounding.
VALUES = {"train.eps": 1e-4, "train.cohort": 2}


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def updates(folder):
    return [e for e in events(folder) if e["event"] == "client_update"]


def adapter(result):
    tensors = load_tensors(result.folder / "adapter" / "adapter_model.safetensors")
    return torch.cat([t.flatten() for _, t in sorted(tensors.items())])


class Killed(BaseException): ...


def kill_in_round_2(what, round, done, total):
    if (what, round, done) == ("train", 2, 1):
        raise Killed


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"adapter.method": "ia3"}, "adapter.method=ia3 is not lora"),
        ({"adapter.dora": True}, "adapter.dora=true needs"),
        ({"adapter.bias": "all"}, "adapter.bias=all trains the base"),
        ({"adapter.dropout": 0.1}, "adapter.dropout=0.1 draws masks"),
        ({"train.packing": "off"}, "train.packing=off pads batches"),
        ({"train.precision": "bf16"}, "train.precision=bf16 is one client's"),
        ({"train.checkpointing": True}, "train.checkpointing=true computes layers again"),
        ({"train.loss_chunk": 8}, "train.loss_chunk=8 makes logits again"),
        ({"hooks": [{"name": "gradient_noise"}], "train.accumulation": 2}, "hooks look into one client's steps"),
        ({"algorithm": "global"}, "all data is in one place"),
        ({"federation.clients_per_round": 1}, "a round has 1 client"),
        ({"runtime.ranks": 2, "runtime.threads": 2}, "runtime.ranks=2 trains each client in several processes"),
    ],
)
def test_what_cannot_train_together_is_refused_and_auto_says_why(values, why, tiny_recipe):
    with pytest.raises(UserError, match=f"train.cohort=2 cannot be used: {why}"):
        prepare(tiny_recipe({**values, **VALUES}), Watch())
    said: list[str] = []
    setting = prepare(tiny_recipe({**values, "train.cohort": "auto"}), Watch(say=said.append))
    assert setting.recipe.train.cohort == "off"
    assert any(why in line for line in said)


def test_sites_train_no_clients_together(tiny_recipe):
    recipe = tiny_recipe({"runtime.name": "distributed", **VALUES})
    with pytest.raises(UserError, match="distributed has its clients in processes of their own"):
        check_recipe(recipe)


@pytest.mark.parametrize("wrong", [1, 0, "on", True, 2.5])
def test_a_cohort_is_off_auto_or_two_and_more(wrong, tiny_recipe):
    with pytest.raises(UserError, match="off, auto, or a number of clients from 2 on"):
        tiny_recipe({"train.cohort": wrong})
    assert tiny_recipe({"train.cohort": False}).train.cohort == "off"  # as YAML reads off


def test_auto_writes_the_size_that_was_quickest(tiny_recipe, monkeypatch, tmp_path):
    seen = []

    def timed(model, batches, sizes):
        seen.append((len(batches), [b.tokens for b in batches], list(sizes)))
        return {2: 1.4}

    monkeypatch.setattr(cohorts, "speedups", timed)
    said: list[str] = []
    recipe = tiny_recipe({"train.cohort": "auto", "federation.rounds": 1})
    result = fedloom.run(recipe, out=tmp_path / "run", watch=Watch(say=said.append))
    assert "together against alone: 2 clients 1.40x; train.cohort=2" in said
    assert fedloom.Recipe.load(result.folder).train.cohort == 2
    (count, tokens, sizes) = seen[0]
    assert (count, sizes) == (3, [2])
    assert all(n > 0 for n in tokens)
    monkeypatch.setattr(cohorts, "speedups", lambda *args: {2: 1.02})
    assert prepare(recipe, Watch()).recipe.train.cohort == "off"


def test_a_run_with_cohorts_is_the_run_without_and_survives_a_kill(tiny_recipe, tmp_path):
    """Three clients in cohorts of two: one trains alone in each round. Mixed ranks, every client's cost its own."""
    ranks = {"algorithm": "hetlora", "adapter.ranks": {"copy": 1}, "train.optimizer_state": "keep"}
    recipe = tiny_recipe({**ranks, **VALUES})
    alone = fedloom.run(recipe.with_values({"train.cohort": "off"}), out=tmp_path / "alone")
    whole = fedloom.run(recipe, out=tmp_path / "whole")
    assert float((adapter(whole) - adapter(alone)).norm()) <= 1e-5 * float(adapter(alone).norm())
    keys = ("round", "client", "examples", "tokens", "steps", "skipped_steps")
    counted = [[{k: e[k] for k in keys} for e in updates(r.folder)] for r in (alone, whole)]
    assert counted[0] == counted[1]
    for one, other in zip(updates(alone.folder), updates(whole.folder), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    for key in ("train_tokens", "train_flops", "steps"):
        assert whole.summary["cost"][key] == alone.summary["cost"][key]
    with pytest.raises(Killed):
        fedloom.run(recipe, out=tmp_path / "killed", watch=Watch(tick=kill_in_round_2))
    resumed = fedloom.run(recipe, out=tmp_path / "killed", resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_an_asynchronous_run_with_cohorts_goes_on_to_the_same_bits(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"algorithm": {"name": "fedbuff", "buffer": 2}, **VALUES, "federation.rounds": 3})
    whole = fedloom.run(recipe, out=tmp_path / "whole")
    with pytest.raises(Killed):
        fedloom.run(recipe, out=tmp_path / "killed", watch=Watch(tick=kill_in_round_2))
    resumed = fedloom.run(recipe, out=tmp_path / "killed", resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_clients_that_clip_for_privacy_train_together_too(tiny_recipe, tmp_path):
    privacy = {"privacy.clip": 1.0, "privacy.noise": 0.0, "privacy.where": "client"}
    recipe = tiny_recipe({**VALUES, **privacy, "federation.rounds": 1})
    alone = fedloom.run(recipe.with_values({"train.cohort": "off"}), out=tmp_path / "alone")
    whole = fedloom.run(recipe, out=tmp_path / "whole")
    assert float((adapter(whole) - adapter(alone)).norm()) <= 1e-5 * float(adapter(alone).norm())


def test_where_memory_is_too_small_clients_train_one_after_another(tiny_recipe, tmp_path, monkeypatch):
    def too_much(self):
        raise torch.OutOfMemoryError("made to")

    recipe = tiny_recipe({**VALUES, "federation.rounds": 1})
    alone = fedloom.run(recipe.with_values({"train.cohort": "off"}), out=tmp_path / "alone")
    monkeypatch.setattr(Cohort, "_forward", too_much)
    monkeypatch.setattr("fedloom.federation.checks.model_rules.refusal", lambda model: "")
    result = fedloom.run(recipe, out=tmp_path / "run")
    assert result.summary["adapter_sha256"] == alone.summary["adapter_sha256"]


@pytest.mark.parametrize("name", ["fedavg", "flora"])  # flora: the reference takes a base delta out, for one seat alone
def test_preferences_are_learned_together_with_each_pairs_reference_known_once(name, tiny_recipe, tmp_path):
    pairs = preferences.write_pairs(tmp_path / "pairs.jsonl")
    recipe = tiny_recipe({"algorithm": name, "train.objective": "dpo", "data.path": str(pairs), **VALUES})
    alone = fedloom.run(recipe.with_values({"train.cohort": "off"}), out=tmp_path / "alone")
    whole = fedloom.run(recipe, out=tmp_path / "whole")
    for one, other in zip(updates(alone.folder), updates(whole.folder), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert one["loss"] != pytest.approx(0.6931472, abs=1e-6) or one["round"] == 1
    assert whole.summary["loss"]["after"] == pytest.approx(alone.summary["loss"]["after"], abs=1e-5)
    assert whole.summary["cost"]["train_flops"] == alone.summary["cost"]["train_flops"]  # the references' included
