"""The table of PEFT methods, the recipe's keys that belong to each, and AdaLoRA's choices."""

from __future__ import annotations

import dataclasses

import numpy as np
import peft
import pytest
import torch
import transformers

from fedloom.common.errors import UserError
from fedloom.data.batching import Batch, collate
from fedloom.federation.checks import check_algorithm
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.forward import token_losses
from fedloom.models.loading import Base
from fedloom.recipe.adapter import METHODS
from fedloom.recipe.recipe import AdapterConfig, Recipe
from fedloom.training.flops import Flops
from fedloom.training.trainer import FitResult, _accumulate
from tests.helpers import tiny
from tests.helpers.peft_by_hand import (
    VARIANTS,
    WIDTH,
    attached,
    base_model,
    moved,
    plain_peft,
    sequences,
    together,
)

# ------------------------------------------------------------------ the table and the recipe's keys


def test_the_table_names_what_peft_and_the_recipe_have():
    keys = set(AdapterConfig.model_fields) - {"method"}
    assert set().union(*(m.keys for m in METHODS.values())) == keys
    for name, method in METHODS.items():
        assert set(method.defaults) <= method.keys, name
        if method.config is not None:
            known = {f.name for f in dataclasses.fields(getattr(peft, method.config))}
            assert {*method.arguments, *method.fixed} <= known, name
    assert {v["method"] for v in VARIANTS.values()} == set(METHODS)  # a new method needs a variant here


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "prompt_tunning"}, "did you mean prompt_tuning"),
        ({"method": "ia3", "rank": 4}, "adapter.rank belongs to lora, adalora"),
        ({"method": "lora", "virtual_tokens": 4}, "adapter.virtual_tokens belongs to prompt_tuning"),
        ({"method": "full", "target_modules": ["q_proj"]}, "adapter.target_modules belongs to"),
        ({"method": "adalora", "dora": True}, "adapter.dora belongs to lora"),
        ({"method": "prompt_tuning", "init": "text"}, "needs a text"),
        ({"method": "prompt_tuning", "init_text": "x"}, "set adapter.init=text"),
        ({"method": "prefix_tuning", "init": "random", "prefix_projection": True}, "leave one of them out"),
        ({"method": "prefix_tuning", "encoder_hidden_size": 8}, "needs adapter.prefix_projection"),
        ({"method": "lora", "bias": "some"}, "adapter.bias"),
        ({"method": "full", "ranks": {"a": 2}}, "adapter.ranks belongs to lora"),
    ],
    ids=str,
)
def test_keys_that_do_not_belong_are_refused_in_a_sentence(keys, said):
    with pytest.raises(UserError) as caught:
        Recipe.parse({"adapter": keys})
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resolved_recipe_says_the_same_again(variant):
    recipe = Recipe.parse({"adapter": VARIANTS[variant]})
    assert Recipe.parse(recipe.resolved()) == recipe
    assert recipe.with_values({"train.lr": 0.5}).adapter == recipe.adapter


def test_another_method_on_the_command_line_leaves_the_recipes_adapter_keys_behind():
    recipe = Recipe.load("quickstart", {"adapter.method": "prefix_tuning", "adapter.virtual_tokens": 7})
    assert recipe.adapter == AdapterConfig(method="prefix_tuning", virtual_tokens=7)
    kept = Recipe.load("quickstart", {"adapter.method": "lora", "adapter.alpha": 3})
    assert kept.adapter.rank == 8 and kept.adapter.alpha == 3


@pytest.mark.parametrize("keys", [{"method": "full"}, {"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_weights_of_the_base_train_in_fp32_only(keys):
    with pytest.raises(UserError, match=r"adapter\.(method|bias)=.*set model\.dtype=float32"):
        Recipe.parse({"model": {"name": "m", "dtype": "bfloat16"}, "adapter": keys})
    base = base_model().to(torch.bfloat16)
    with pytest.raises(UserError, match="bfloat16"):
        attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(**keys), 0)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"full", "bias", "bias-lora-only"}))
def test_a_16_bit_base_takes_an_fp32_adapter(variant):
    base = base_model().to(torch.bfloat16)
    model = moved(attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(**VARIANTS[variant]), 5))
    assert model.adapter.flat.dtype == torch.float32
    losses = token_losses(model, together())
    losses.mean().backward()
    assert torch.isfinite(losses).all() and float(model.grad.norm()) > 0
    fp32 = token_losses(moved(attached(variant)), together())
    assert float((losses - fp32).abs().mean()) < 0.2  # rounding of 16 bits, on losses of six


@pytest.mark.parametrize("option", [{"dora": True}, {"bias": "all"}], ids=str)
def test_algorithms_on_factors_refuse_what_is_not_in_the_factors(option, monkeypatch):
    from fedloom.algorithms.averaging.fedavg import FedAvg
    from fedloom.algorithms.base import Properties

    recipe = Recipe.parse({"adapter": option})
    check_algorithm(recipe)
    monkeypatch.setattr(FedAvg, "properties", Properties(methods=frozenset({"lora"})))
    with pytest.raises(UserError, match=r"does not take adapter\.(dora|bias)="):
        check_algorithm(recipe)


def test_a_method_that_does_not_know_the_architecture_says_so():
    config = transformers.MptConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    for method in ("ia3", "prompt_tuning"):
        base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with pytest.raises(UserError, match=f"adapter.method={method} does not fit this model"):
            attach(Base(base.requires_grad_(False), tiny.tokenizer(), ""), AdapterConfig(method=method), 0)


# ------------------------------------------------------------------ AdaLoRA


class Plain:
    def local_loss(self, model: AdaptedModel, batch: Batch, step_tokens: int) -> torch.Tensor:
        return token_losses(model, batch).sum() / step_tokens


def test_adaloras_orthogonality_is_pefts_own_and_reaches_the_step():
    model = moved(attached("adalora", orthogonality=0.5))
    wrapped, parameters = plain_peft("adalora", model, "llama")  # peft's own weight is 0.5 as well
    seqs = sequences()[1]
    ids = torch.as_tensor(seqs.ids.astype(np.int64))[None]
    labels = ids.clone()
    labels[0, : seqs.prompt] = -100
    wrapped(input_ids=ids, labels=labels).loss.backward()

    loss = _accumulate(model, Plain(), [collate([seqs], packed=True, pad=3)], FitResult(), Flops(model))
    flat = torch.cat([parameters[n].grad.flatten() for n in model.adapter.layout.names])
    assert float((model.grad - flat).norm()) <= 1e-5 * float(flat.norm())
    with torch.no_grad():
        assert loss == pytest.approx(float(token_losses(model, collate([seqs], packed=True, pad=3)).mean()), rel=1e-5)
    assert attached("adalora", orthogonality=0.0).penalty() is None
    assert attached("lora").penalty() is None


def test_adaloras_budget_is_fixed():
    """No rank is masked in training: each module has `rank` singular values to its end."""
    model = attached("adalora", rank=3)
    shapes = {n.rsplit(".", 1)[1]: tuple(s) for n, s in model.adapter.layout.shapes.items() if "q_proj" in n}
    assert shapes == {"lora_A": (3, WIDTH), "lora_B": (WIDTH, 3), "lora_E": (3, 1)}
