"""A base in 8 or 4 bits: less memory, the adapter's gradient of the dequantised weights, exports of what was trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fedloom
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch
from fedloom.models import loading, quantised
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.forward import token_losses
from fedloom.models.loading import Base, load_base
from fedloom.models.quantised import BLOCK, NF4, QuantisedLinear, dequantise, dequantise_model, quantise
from fedloom.models.saved import load_adapted
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, Recipe
from fedloom.reporting.export import export_run
from fedloom.training.flops import Flops
from tests.helpers import tiny

DRAW = np.random.default_rng(0)
BATCH = collate([TokenSequence(DRAW.integers(3, 259, n).astype(np.int32), 2) for n in (30, 17)], packed=True, pad=0)
KINDS = ["int8", "nf4"]


def weight(rows: int = 24, columns: int = 70) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def adapted(base, **settings) -> AdaptedModel:
    model = attach(Base(base.requires_grad_(False), tiny.tokenizer(), ""), AdapterConfig(**{"rank": 2, **settings}), 0)
    with torch.no_grad():
        model.adapter.flat.add_(
            torch.randn(model.adapter.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.02
        )
    return model


def quantised_base(kind: str, **shape):
    base = tiny.causal_lm(**shape).requires_grad_(False)
    quantised.quantise_model(base, kind)
    return base


# ------------------------------------------------------------------ the numbers


def test_int8_is_within_half_a_step_of_each_rows_own_scale():
    w = weight()
    codes, scale = quantise(w, "int8")
    assert codes.dtype == torch.int8 and codes.shape == w.shape and scale.shape == (24, 1)
    assert torch.equal(codes.abs().amax(1), torch.full((24,), 127, dtype=torch.int8))
    assert bool(((dequantise(codes, scale, w.shape) - w).abs() <= scale * 0.5001).all())


def test_nf4_takes_the_nearest_level_of_each_block():
    w = weight()
    codes, scale = quantise(w, "nf4")
    blocks = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % BLOCK)).view(-1, BLOCK)
    assert codes.dtype == torch.uint8 and codes.numel() * 2 == blocks.numel() and scale.shape == (len(blocks), 1)
    nearest = NF4[(blocks[..., None] / scale[..., None] - NF4).abs().argmin(-1)] * scale  # by trying every level
    assert torch.equal(dequantise(codes, scale, w.shape), nearest.view(-1)[: w.numel()].view(w.shape))
    torch.testing.assert_close(dequantise(codes, scale, w.shape).abs().amax(), w.abs().amax())


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zeros_stays_one(kind):
    codes, scale = quantise(torch.zeros(4, 64), kind)
    assert torch.equal(dequantise(codes, scale, torch.Size([4, 64])), torch.zeros(4, 64))


@pytest.mark.quantised
def test_the_numbers_are_those_of_bitsandbytes():
    from bitsandbytes import functional

    w = weight(64, 256)
    packed, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=BLOCK)
    codes, scale = quantise(w, "nf4")
    assert (
        float((packed.view(-1) == codes).float().mean()) > 0.999
    )  # a weight midway between two levels may go either way
    torch.testing.assert_close(state.absmax.view(-1), scale.view(-1))
    torch.testing.assert_close(state.code.cpu(), NF4)
    rows, found, _ = functional.int8_vectorwise_quant(w)
    codes, scale = quantise(w, "int8")
    assert int((rows.int() - codes.int()).abs().max()) <= 1  # bitsandbytes rounds in 16 bits
    torch.testing.assert_close(found.view(-1) / 127, scale.view(-1))


# ------------------------------------------------------------------ the model


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_take_less_memory_and_nothing_else_changes(kind):
    plain, base = tiny.causal_lm(), quantised_base(kind)

    def linears(model) -> int:
        parts = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
        return sum(t.nbytes for m in parts for t in (*m.parameters(), *m.buffers()))

    assert linears(base) / linears(plain) < {"int8": 0.30, "nf4": 0.15}[kind]
    same = plain.state_dict()
    left = {n: t for n, t in base.state_dict().items() if n in same and t.dtype == torch.float32}
    assert any("embed" in n for n in left) and any("norm" in n for n in left)
    assert all(torch.equal(t, same[n]) for n, t in left.items())
    assert Flops(adapted(base)).of(BATCH) == Flops(adapted(plain)).of(BATCH)


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "prefix_tuning"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_one_on_the_dequantised_weights(kind, method):
    settings = {"method": method} | ({"rank": 2} if "lora" in method else {"rank": 8})
    settings |= {"virtual_tokens": 3} if method == "prefix_tuning" else {}
    found = []
    for whole in (False, True):
        base = quantised_base(kind)
        if whole:
            dequantise_model(base, torch.float32)
        model = adapted(base, **settings)
        assert any(isinstance(m, QuantisedLinear) for m in model.module.modules()) != whole
        losses = token_losses(model, BATCH)
        losses.mean().backward()
        found.append((losses.detach(), model.grad.clone()))
    assert float(found[0][1].norm()) > 0
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_near_the_model_that_it_came_from(kind):
    shape = {"spread": 0.05}
    exact, near = (
        token_losses(adapted(b), BATCH).mean() for b in (tiny.causal_lm(**shape), quantised_base(kind, **shape))
    )
    assert 0 < abs(float(near - exact)) < {"int8": 2e-3, "nf4": 5e-2}[kind]


def test_nothing_of_a_weight_is_kept_for_backward():
    model = adapted(quantised_base("int8"))
    shapes = {(m.out_features, m.in_features) for m in model.module.modules() if isinstance(m, QuantisedLinear)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        token_losses(model, BATCH).mean().backward()
    assert kept and not shapes & set(kept)


def test_16_bit_products_have_a_gradient_too():
    model = adapted(quantised_base("nf4"))
    token_losses(model, BATCH).mean().backward()
    exact = model.grad.clone()
    model.grad.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_losses(model, BATCH).mean()
    loss.backward()
    assert 0 < float((model.grad - exact).norm() / exact.norm()) < 0.1


# ------------------------------------------------------------------ runs, exports, refusals


@pytest.mark.parametrize("algorithm", ["fedavg", "feddpa", "fedkseed"])
def test_a_run_trains_on_it_and_says_so(tiny_recipe, tmp_path, algorithm):
    more = {"algorithm": algorithm, "model.quantization": "nf4", "federation.rounds": 1}
    summary = fedloom.run(tiny_recipe(more), out=tmp_path / "run").summary
    assert summary["base"] == {"dtype": "float32", "quantization": "nf4"}
    assert summary["loss"]["after"] != summary["loss"]["before"]
    assert algorithm == "fedkseed" or summary["loss"]["after"] < summary["loss"]["before"]


def test_what_is_evaluated_exported_and_merged_is_what_was_trained(tiny_recipe, tmp_path):
    run = fedloom.run(tiny_recipe({"model.quantization": "nf4", "train.lr": 5e-2}), out=tmp_path / "run")
    config = Recipe.load(tmp_path / "run").model
    with torch.no_grad():
        live = token_losses(load_adapted(config, tmp_path / "run" / "adapter", "cpu"), BATCH)
        export_run(tmp_path / "run", "merged", tmp_path / "merged", None)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert not any(isinstance(m, QuantisedLinear) for m in merged.modules())
        whole = token_losses(attach(Base(merged, tiny.tokenizer(), ""), AdapterConfig(method="full"), 0), BATCH)
        plain = token_losses(load_adapted(ModelConfig(name=config.name), tmp_path / "run" / "adapter", "cpu"), BATCH)
    torch.testing.assert_close(whole, live, rtol=0, atol=1e-4)
    assert float((plain - live).abs().max()) > 1e-2  # on the weights that it was not trained on it is another model
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert run.summary["adapter_sha256"]


def test_algorithms_that_work_on_base_weights_refuse_it(tiny_recipe):
    refused = [n for n in registry.algorithms.names() if registry.algorithms.get(n).properties.weights]
    assert set(refused) == {"flora", "fedex_lora", "slora", "fedot", "fedbiot"}
    for name in refused:
        with pytest.raises(UserError, match=rf"algorithm {name} works on weights of the base"):
            prepare(tiny_recipe({"algorithm": name, "model.quantization": "int8"}), Watch())


@pytest.mark.parametrize("adapter", [{"method": "full"}, {"bias": "all"}, {"dora": True}], ids=str)
def test_adapters_that_train_or_measure_base_weights_refuse_it(adapter):
    with pytest.raises(UserError, match=r"model\.quantization=int8 quantises them: leave one of them out"):
        Recipe.parse({"adapter": adapter, "model": {"name": "x", "quantization": "int8"}})


def test_sharded_bases_and_models_without_linear_layers_refuse_it(tiny_recipe):
    with pytest.raises(UserError, match="shards plain weights"):
        prepare(tiny_recipe({"model.quantization": "int8", "runtime.ranks": 2, "runtime.parallel": "fsdp"}), Watch())
    odd = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="which has no torch linear layers"):
        quantised.quantise_model(odd, "int8")


# ------------------------------------------------------------------ a GPU's way, played


class Played:
    """Stands in for transformers' configuration of bitsandbytes."""

    def __init__(self, **given) -> None:
        self.given = given


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_bitsandbytes_is_asked_for_while_loading(tiny_model, monkeypatch, kind):
    seen: dict = {}

    def from_pretrained(where, **options):
        seen.update(options)
        return tiny.causal_lm()

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", Played)
    monkeypatch.setattr(
        quantised.importlib.util, "find_spec", lambda name: object() if name == "bitsandbytes" else None
    )
    made = load_base(ModelConfig(name=str(tiny_model), quantization=kind, dtype="bfloat16"), "cuda:0")
    assert seen["device_map"] == {"": "cuda:0"} and seen["dtype"] == torch.bfloat16
    asked = seen["quantization_config"].given
    if kind == "int8":
        assert asked == {"load_in_8bit": True}
    else:
        assert asked["load_in_4bit"] and asked["bnb_4bit_quant_type"] == "nf4"
        assert asked["bnb_4bit_compute_dtype"] == torch.bfloat16 and asked["bnb_4bit_use_double_quant"] is False
    assert not any(
        isinstance(m, QuantisedLinear) for m in made.model.modules()
    )  # nothing of ours, and nothing is moved


def test_a_gpu_without_bitsandbytes_is_told(tiny_model, monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs bitsandbytes: install fedloom\[quantised\], or set runtime\.device=cpu"
    ):
        load_base(ModelConfig(name=str(tiny_model), quantization="nf4"), "cuda")
