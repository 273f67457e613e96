"""The public names, and a run from a notebook: what the README shows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fedloom
from fedloom import Algorithm, Recipe, Result, RunFailed, UserError, run


def test_public_names():
    assert sorted(fedloom.__all__) == [
        "Algorithm",
        "Hook",
        "Recipe",
        "Result",
        "RunFailed",
        "UserError",
        "__version__",
        "run",
    ]
    for name in fedloom.__all__:
        assert getattr(fedloom, name) is not None
    assert dir(fedloom) == sorted(fedloom.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = fedloom.runn
    assert issubclass(UserError, ValueError)
    assert issubclass(RunFailed, RuntimeError)
    assert Algorithm.__name__ == "Algorithm"


def test_importing_fedloom_imports_no_torch():
    code = (
        "import sys, fedloom; from fedloom import Recipe; Recipe.load('quickstart'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_from_python(tiny_recipe, tmp_path):
    result = run(tiny_recipe({"train.lr": 5e-2, "train.steps": 6}), out=str(tmp_path / "mine"))
    assert isinstance(result, Result)
    assert result.summary["loss"]["after"] < result.summary["loss"]["before"]
    assert result.summary == json.loads((tmp_path / "mine" / "summary.json").read_text())
    assert result.report == tmp_path / "mine" / "report.html"
    assert result.report.is_file()
    ids = result.tokenizer("copy: cow", return_tensors="pt").input_ids
    out = result.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert out.shape[0] == 1
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 5
    with torch.no_grad(), result.model.disable_adapter():
        plain = result.model(input_ids=ids).logits
    with torch.no_grad():
        tuned = result.model(input_ids=ids).logits
    assert float((plain - tuned).abs().max()) > 1e-3


def test_the_result_in_memory_is_the_one_on_disk(tiny_recipe, tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = run(tiny_recipe({"evaluation.answers": 3}), out=tmp_path / "run")
    ids = result.tokenizer("last: fox gnu", return_tensors="pt").input_ids
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run" / "adapter")
    with torch.no_grad():
        assert torch.allclose(result.model(input_ids=ids).logits, saved(input_ids=ids).logits, atol=1e-5)


def test_recipes_from_names_files_and_overrides(tmp_path):
    recipe = Recipe.load("quickstart", {"train.lr": 1e-4, "federation.rounds": 2})
    assert (recipe.train.lr, recipe.federation.rounds) == (1e-4, 2)
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe
    assert Recipe.load(str(path), {"seed": 1}).seed == 1
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_several_runs_in_one_process_do_not_disturb_each_other(tiny_recipe, tmp_path):
    first = run(tiny_recipe(), tmp_path / "a").summary["adapter_sha256"]
    torch.manual_seed(77)
    torch.rand(3)
    run(tiny_recipe({"algorithm.name": "local", "adapter.dropout": 0.3}, seed=5), tmp_path / "b")
    state = torch.random.get_rng_state()
    assert run(tiny_recipe(), tmp_path / "c").summary["adapter_sha256"] == first
    assert torch.equal(torch.random.get_rng_state(), state)  # nor the caller's own random numbers


def test_errors_are_exceptions_with_the_sentence(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match="clients_per_round=9"):
        run(tiny_recipe({"federation.clients_per_round": 9}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"unknown key train\.stepz"):
        tiny_recipe({"train.stepz": 9})
    run(tiny_recipe(), tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        run(tiny_recipe(), tmp_path / "run")
    run(tiny_recipe(), tmp_path / "run", overwrite=True)


def test_a_watcher_sees_the_run(tiny_recipe, tmp_path):
    from fedloom.federation.watch import Watch

    said: list[str] = []
    events: list[dict] = []
    ticks: list[tuple[str, int, int, int]] = []
    watch = Watch(said.append, events.append, lambda *args: ticks.append(args))
    run(tiny_recipe(), tmp_path / "run", watch=watch)
    assert any(text.startswith("loading") for text in said)
    assert [e["event"] for e in events][:2] == ["run_started", "evaluation"]
    assert events[-1]["event"] == "run_finished"
    assert [t for t in ticks if t[:2] == ("train", 1)] == [("train", 1, k, 3) for k in range(4)]


def test_an_algorithm_of_ones_own(tiny_recipe, tmp_path):
    """What docs promise: subclass, override what differs, name it."""
    from fedloom.algorithms.averaging.fedavg import FedAvg
    from fedloom.common import registry

    class Halved(FedAvg):
        """Moves half as far as FedAvg."""

        def aggregate(self, updates):
            before = self.shared.flat.clone()
            metrics = super().aggregate(updates)
            self.shared.copy_(before + (self.shared.flat - before) / 2)
            return {**metrics, "halved": 1.0}

    registry.algorithms.register("halved", Halved)
    one_round = {"federation.rounds": 1}
    whole = run(tiny_recipe(one_round), tmp_path / "whole")
    half = run(tiny_recipe({**one_round, "algorithm.name": "halved"}), tmp_path / "half")
    assert half.summary["loss"]["before"] == whole.summary["loss"]["before"]
    assert half.summary["loss"]["before"] > half.summary["loss"]["after"] > whole.summary["loss"]["after"]
