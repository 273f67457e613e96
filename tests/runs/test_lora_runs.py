"""Every LoRA-aware algorithm through whole runs: two rounds, killed and resumed, exported and measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.experiment.evaluate import evaluate
from fedloom.experiment.run import run
from fedloom.federation.record.checkpoints import Checkpoints
from tests.helpers import tiny

pytestmark = pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")

UNIFORM = {
    "fedit": {}, "ffa_lora": {}, "flora": {}, "flexlora": {}, "hetlora": {}, "fedsa_lora": {}, "rolora": {},
    "fedex_lora": {}, "lora_fair": {}, "fed_sb": {}, "fedsvd": {}, "fedrot_lora": {}, "slora": {},
}  # fmt: skip
MIXED = {"flora": {}, "flexlora": {}, "hetlora": {}}
RANKS = {"copy": 1, "last": 2}  # and `upper` has 3

CASES = [pytest.param(n, o, None, id=n) for n, o in UNIFORM.items()]
CASES += [pytest.param(n, o, RANKS, id=f"{n}-mixed") for n, o in MIXED.items()]
CASES += [
    pytest.param("hetlora", {"gamma": 0.5, "penalty": 5.0}, RANKS, id="hetlora-pruning"),
    pytest.param("slora", {"sparse_rounds": 2}, None, id="slora-sparse"),
]


def result(folder: Path) -> dict[str, bytes | str]:
    """All that a run leaves as its result, byte for byte."""
    files = sorted(p for top in ("adapter", "adapters") for p in (folder / top).rglob("*.safetensors"))
    assert files
    summary = json.loads((folder / "summary.json").read_text())
    return {"sha256": summary["adapter_sha256"], **{p.relative_to(folder).as_posix(): p.read_bytes() for p in files}}


@pytest.fixture
def recipe(tiny_recipe):
    def make(name, options=None, ranks=None, **more):
        values = {"adapter.rank": 3, "adapter.alpha": 6, "adapter.ranks": ranks, "train.optimizer_state": "keep"}
        algorithm = {"name": name, **(options or {})}
        return tiny_recipe({"algorithm": algorithm, **values, **more})

    return make


@pytest.mark.parametrize(("name", "options", "ranks"), CASES)
def test_two_rounds_and_a_kill_between_them(recipe, tmp_path, monkeypatch, name, options, ranks):
    """Two of three clients in each round, so somebody comes late. Killed when all of round 2 is done but its checkpoint,
    and resumed: the same bits as undisturbed.
    """
    made = recipe(name, options, ranks, **{"federation.clients_per_round": 2})
    whole = run(made, tmp_path / "whole").summary
    assert whole["failures"] == 0 and whole["loss"]["after"] != whole["loss"]["before"]
    save = Checkpoints.save

    def dying(self, state):
        if state.round == 2:
            raise KeyboardInterrupt
        return save(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "killed")
    run(made, tmp_path / "killed", resume=True)
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


@pytest.mark.parametrize("name", ["fedit", "hetlora", "fedsa_lora", "fedex_lora", "lora_fair", "slora"])
def test_one_client_alone_is_plain_training(recipe, tmp_path, name):
    """With the neutral options that it declares, bit for bit."""
    alone = {"split.splitter": "uniform", "split.num_clients": 1}
    found = {}
    for chosen in (name, "local"):
        neutral = registry.algorithms.get(chosen).properties.neutral
        run(recipe(chosen, neutral, **alone), tmp_path / chosen)
        (file,) = (tmp_path / chosen).glob("adapter*/**/adapter_model.safetensors")
        found[chosen] = load_file(file)
    assert found[name].keys() == found["local"].keys()
    assert all(torch.equal(t, found["local"][n]) for n, t in found[name].items())


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "fed_sb", "slora"])
def test_what_is_saved_is_what_was_measured(recipe, tmp_path, name):
    """The exported adapter with its base delta has the loss that the clients measured from their payloads."""
    options = {"sparse_rounds": 3} if name == "slora" else {}
    run(recipe(name, options), tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    measured = [e for e in events if e["event"] == "evaluation"]
    assert measured[-1]["loss"] != measured[0]["loss"]
    again = evaluate(str(tmp_path / "run"), None, {}, None)
    assert again["loss"] == pytest.approx(measured[-1]["loss"], rel=1e-5)
    assert (tmp_path / "run" / "adapter" / "base_delta.safetensors").is_file() == (name != "fed_sb")


def test_payloads_hold_what_the_docs_say(recipe, tmp_path):
    """Bytes as the wire counts them: B alone is half of both factors or less, R a sliver, a lower rank less."""

    def up(name, ranks=None):
        run(recipe(name, None, ranks), tmp_path / f"{name}-{bool(ranks)}")
        lines = (tmp_path / f"{name}-{bool(ranks)}" / "events.jsonl").read_text().splitlines()
        updates = [e for e in map(json.loads, lines) if e["event"] == "client_update" and e["round"] == 1]
        return {e["client"]: e["upload_bytes"] for e in updates}

    full, half, sliver, mixed = up("fedit"), up("ffa_lora"), up("fed_sb"), up("flora", RANKS)
    assert half["copy"] < 0.75 * full["copy"] and sliver["copy"] < half["copy"]
    assert mixed["copy"] < mixed["last"] < mixed["upper"] <= full["upper"] + 512


def test_mixed_ranks_are_refused_where_they_are_not_claimed(recipe, tmp_path):
    with pytest.raises(UserError, match="flexlora, flora, hetlora"):
        run(recipe("fedit", None, RANKS), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "slora", "flexlora"])
def test_weights_that_are_stored_the_other_way_round(recipe, tmp_path, name):
    """GPT-2 keeps its weights as [in, out]; what is measured, saved and measured again is the same model."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": tiny.VOCABULARY}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = tiny.save_model(tmp_path / "gpt2", GPT2LMHeadModel(GPT2Config(**shape, **special)))
    options = {"sparse_rounds": 3} if name == "slora" else {}
    run(recipe(name, options, **{"model.name": str(folder)}), tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    measured = [e["loss"] for e in events if e["event"] == "evaluation"]
    assert measured[-1] < measured[0]
    again = evaluate(str(tmp_path / "run"), None, {}, None)
    assert again["loss"] == pytest.approx(measured[-1], rel=1e-5)


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_16_bit_base_learns_through_its_delta(recipe, tmp_path, name):
    run(recipe(name, **{"model.dtype": "bfloat16"}), tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    measured = [e["loss"] for e in events if e["event"] == "evaluation"]
    assert measured[-1] < measured[0]
    delta = load_file(tmp_path / "run" / "adapter" / "base_delta.safetensors")
    assert delta and all(t.dtype == torch.float32 for t in delta.values())
    again = evaluate(str(tmp_path / "run"), None, {}, None)
    assert again["loss"] == pytest.approx(measured[-1], rel=1e-5)


def test_slora_is_refused_on_a_16_bit_base(recipe, tmp_path):
    with pytest.raises(UserError, match="must be float32"):
        run(recipe("slora", **{"model.dtype": "bfloat16"}), tmp_path / "run")
