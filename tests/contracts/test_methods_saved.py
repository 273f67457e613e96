"""Every PEFT method on disk and in whole runs: exports, merges, personal results, resume, base deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from fedloom import run
from fedloom.common.errors import UserError
from fedloom.experiment.evaluate import evaluate
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.forward import plain_attention, token_losses
from fedloom.models.loading import Base, load_base
from fedloom.models.saved import export_merged, load_adapted
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, Recipe
from fedloom.reporting.export import export_run
from tests.helpers import tiny
from tests.helpers.peft_by_hand import (
    VARIANTS,
    VIRTUAL,
    WIDTH,
    attached,
    base_model,
    moved,
    together,
)

# ------------------------------------------------------------------ on disk


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    out: torch.Tensor = model(input_ids=ids).logits
    return out[:, -6:]


def folder_of(architecture: str, tmp_path: Path) -> str:
    return str(tiny.save_model(tmp_path / architecture, base_model(architecture)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_export_is_the_same_model_to_its_own_library_and_to_us(architecture, variant, tmp_path):
    where = folder_of(architecture, tmp_path)
    base = load_base(ModelConfig(name=where))
    model = moved(attach(base, AdapterConfig(**VARIANTS[variant]), 5))
    token_losses(model, together())  # leaves the packed attention in the configuration
    model.save(tmp_path / "adapter", where)
    model.causal_lm.config._attn_implementation = plain_attention(model)
    expected = logits(model.module)

    if variant == "full":
        alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        fresh = transformers.AutoModelForCausalLM.from_pretrained(where)
        alone = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    assert torch.allclose(logits(alone.eval()), expected, atol=1e-5)
    ours = load_adapted(ModelConfig(name=where), tmp_path / "adapter", "cpu")
    assert torch.allclose(logits(ours.module), expected, atol=1e-5)
    assert torch.allclose(token_losses(ours, together()), token_losses(model, together()), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_result_comes_back_bit_for_bit_encoders_included(variant, tmp_path):
    """What a personal algorithm's client reads back: peft's file alone lacks the networks behind prompts."""
    where = folder_of("gpt2", tmp_path)
    model = moved(attach(load_base(ModelConfig(name=where)), AdapterConfig(**VARIANTS[variant]), 5))
    kept = model.adapter.flat.clone()
    model.save(tmp_path / "adapter", where)
    model.adapter.flat.zero_()
    model.load(tmp_path / "adapter")
    assert torch.equal(model.adapter.flat, kept)
    lossy = variant in ("p_tuning", "prefix_projection")
    assert (tmp_path / "adapter" / "trained.safetensors").is_file() == lossy


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(VIRTUAL)))
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merged_model_is_the_same_model_without_peft(architecture, variant, tmp_path):
    where = folder_of(architecture, tmp_path)
    model = moved(attach(load_base(ModelConfig(name=where)), AdapterConfig(**VARIANTS[variant]), 5))
    model.save(tmp_path / "adapter", where)
    export_merged(ModelConfig(name=where), tmp_path / "adapter", tmp_path / "merged")
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(alone), logits(model.module), atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 2


@pytest.mark.parametrize("variant", VIRTUAL)
def test_virtual_tokens_cannot_be_merged(variant, tmp_path):
    where = folder_of("llama", tmp_path)
    attach(load_base(ModelConfig(name=where)), AdapterConfig(**VARIANTS[variant]), 5).save(tmp_path / "adapter", where)
    with pytest.raises(UserError, match=r"cannot be merged.*use --format peft") as caught:
        export_merged(ModelConfig(name=where), tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert caught.value.args[0].count("\n") == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_full_fine_tuning_counts_tied_embeddings_once(architecture, tmp_path):
    base = base_model(architecture, tie_word_embeddings=True)
    numel = sum(p.numel() for p in base.parameters())
    model = attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(method="full"), 0)
    assert model.adapter.layout.numel == numel
    assert not [n for n in model.adapter.layout.names if "lm_head" in n]
    moved(model)
    assert model.causal_lm.get_output_embeddings().weight.data_ptr() == (
        model.causal_lm.get_input_embeddings().weight.data_ptr()
    )
    model.save(tmp_path / "adapter", "")
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(alone), logits(model.module), atol=1e-5)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"full"}))
def test_base_deltas_come_and_go_under_every_method(variant):
    model, plain = moved(attached(variant)), moved(attached(variant))
    before = token_losses(model, together())
    up = "model.layers.1.mlp.down_proj.weight"
    delta = 0.3 * torch.randn(WIDTH, 64, generator=torch.Generator().manual_seed(1))
    model.set_base_delta({up: delta})
    with torch.no_grad():
        plain.base_weights()[up] += delta
    after = token_losses(model, together())
    assert torch.equal(after, token_losses(plain, together()))
    assert not torch.allclose(after, before, atol=1e-3)
    model.set_base_delta(None)
    assert torch.equal(token_losses(model, together()), before)


def test_a_base_delta_on_a_base_that_is_trained_is_refused():
    model = attached("full")
    model.set_base_delta(None)
    with pytest.raises(ValueError, match="cannot be used with full fine-tuning"):
        model.set_base_delta({"model.layers.1.mlp.down_proj.weight": torch.zeros(WIDTH, 64)})


# ------------------------------------------------------------------ whole runs

RATES = {"full": 1e-3, "prompt_tuning": 3e-2, "prefix_tuning": 3e-2, "ia3": 3e-2}


def settings(variant: str) -> dict[str, Any]:
    chosen = {f"adapter.{k}": v for k, v in VARIANTS[variant].items()}
    return {**chosen, "train.lr": RATES.get(variant, 1e-2), "train.steps": 4}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_rounds_of_fedavg_learn_and_are_measured_again_alike(variant, tiny_recipe, tmp_path):
    result = run(tiny_recipe(settings(variant)), tmp_path / "run")
    loss = result.summary["loss"]
    assert loss["after"] < loss["before"]
    assert Recipe.load(result.folder / "recipe.yaml").train.packing == "on"
    again = evaluate(str(result.folder), None, {}, None)
    assert again["loss"] == pytest.approx(loss["after"], rel=1e-5)
    if variant in VIRTUAL:
        with pytest.raises(UserError, match="cannot be merged"):
            export_run(result.folder, "merged", tmp_path / "out", None)
    elif variant == "full":
        with pytest.raises(UserError, match="no adapter: use --format merged"):
            export_run(result.folder, "peft", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    if variant not in VIRTUAL:
        merged = export_run(result.folder, "merged", tmp_path / "out", None)
        own = {f"{k}": v for k, v in settings("lora").items() if k.startswith("adapter")}
        measured = evaluate(str(merged), str(result.folder), own, None)
        assert measured["loss"] == pytest.approx(loss["after"], rel=1e-4)


@pytest.mark.parametrize("variant", ["p_tuning", "prefix_tuning", "full"])
def test_personal_results_are_written_and_measured_for_every_kind_of_export(variant, tiny_recipe, tmp_path):
    result = run(tiny_recipe({**settings(variant), "algorithm": "local", "evaluation.answers": 2}), tmp_path / "run")
    for client, numbers in result.summary["per_client"].items():
        again = evaluate(str(result.folder), None, {}, client)
        assert again["clients"][client]["loss"] == pytest.approx(numbers["loss"]["after"], rel=1e-5)


def test_a_resumed_p_tuning_run_is_the_undisturbed_one(tiny_recipe, tmp_path):
    """Checkpoints hold the network behind the prompt, not only the prompt."""
    whole = run(tiny_recipe(settings("p_tuning")), tmp_path / "whole")
    run(tiny_recipe({**settings("p_tuning"), "train.schedule": "constant", "federation.rounds": 1}), tmp_path / "part")
    longer = run(tiny_recipe({**settings("p_tuning"), "train.schedule": "constant"}), tmp_path / "part", resume=True)
    straight = run(tiny_recipe({**settings("p_tuning"), "train.schedule": "constant"}), tmp_path / "straight")
    assert longer.summary["adapter_sha256"] == straight.summary["adapter_sha256"]
    assert longer.summary["adapter_sha256"] != whole.summary["adapter_sha256"]


# ------------------------------------------------------------------ what averaging means


def test_the_mean_of_ia3_vectors_is_the_mean_of_what_clients_learned():
    """l ⊙ W is linear in l: FedAvg of IA³ is exact in the weights, unlike that of LoRA's factors."""
    for variant, exact in (("ia3", True), ("lora", False)):
        means, merged = [], []
        for seed in (1, 2):
            model = moved(attached(variant), seed)
            means.append(model.adapter.flat.clone())
            merged.append(merged_weights(model))
        model = attached(variant)
        model.adapter.flat.copy_((means[0] + means[1]) / 2)
        together_ = merged_weights(model)
        gap = max(float((together_[n] - (merged[0][n] + merged[1][n]) / 2).abs().max()) for n in together_)
        assert (gap < 1e-6) == exact, (variant, gap)


def merged_weights(model: AdaptedModel) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.module.merge_and_unload().named_parameters()}
