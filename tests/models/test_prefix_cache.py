"""Adapters on chosen layers, and the frozen layers below them computed once: the same losses, gradients and bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import fedloom
from fedloom.common import cache_folder
from fedloom.common.errors import UserError
from fedloom.common.randomness import fork_torch
from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.forward import supports_prefix, token_losses
from fedloom.models.layers import first_trained_layer
from fedloom.models.loading import Base
from fedloom.models.prefix_cache import MEGABYTE, PrefixCache, prefix_digest, prefix_obstacle
from fedloom.models.recompute import save_memory
from fedloom.recipe.recipe import AdapterConfig, Recipe
from fedloom.training.flops import Flops
from tests.helpers import tiny

DRAW = np.random.default_rng(0)
SEQUENCES = [TokenSequence(DRAW.integers(3, 259, n).astype(np.int32), 2) for n in (30, 17, 25, 17)]
BATCH = collate(SEQUENCES, packed=True, pad=0)


def adapted(base=None, **adapter) -> AdaptedModel:
    base = tiny.causal_lm(num_hidden_layers=6) if base is None else base
    settings = AdapterConfig(**{"rank": 2, "layers": "last-2", **adapter})
    return attach(Base(base.requires_grad_(False), tiny.tokenizer(), ""), settings, 0)


def gpt2(**drop) -> GPT2LMHeadModel:
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **drop}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=5, n_head=4, **rates)).eval()


def trained(model: AdaptedModel, **spared) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, gradient) of one pass."""
    model.grad.zero_()
    model.module.train()
    with fork_torch(0, "dropout"), save_memory(model, spared.get("recompute", False), spared.get("chunk")):
        losses = token_losses(model, BATCH)
        losses.mean().backward()
    model.module.eval()
    return losses.detach(), model.grad.clone()


def passes(model: AdaptedModel) -> list[int]:
    """Counts the forward passes of the first layer's own work from here on, in its only element."""
    count = [0]

    def counted(*_):
        count[0] += 1

    model.causal_lm.model.layers[0].mlp.register_forward_hook(counted)
    return count


# ------------------------------------------------------------------ adapter.layers


def layers_of(model: AdaptedModel) -> set[int]:
    return {int(n.split("layers.")[1].split(".")[0]) for n in model.adapter.layout.names}


@pytest.mark.parametrize("method", ["lora", "adalora", "full"])
def test_chosen_layers_train_and_no_others(method):
    settings = {"method": method} | ({} if method == "full" else {"rank": 2})
    for wanted, expected in (("last-2", {4, 5}), ([1, 3], {1, 3}), ([5], {5})):
        base = tiny.causal_lm(num_hidden_layers=6).requires_grad_(False)
        model = attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(**settings, layers=wanted), 0)
        assert layers_of(model) == expected
        assert first_trained_layer(model) == min(expected)
        assert float(trained(model)[1].norm()) > 0


def test_its_export_is_what_peft_loads(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.adapter.flat.normal_(0, 0.05)
    model.save(tmp_path, "tiny")
    other = PeftModel.from_pretrained(tiny.causal_lm(num_hidden_layers=6), str(tmp_path)).eval()
    ids = torch.from_numpy(SEQUENCES[0].ids.astype(np.int64))[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model.module(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"layers": "first-2"}, "set a list of numbers, or last-4 and the like"),
        ({"layers": []}, "leaves nothing to train"),
        ({"layers": [-1]}, "adapter.layers"),
        ({"layers": [1], "bias": "all"}, "use lora_only"),
        ({"layers": [1], "method": "ia3"}, "adapter.layers belongs to lora, adalora, full"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_are_refused_in_a_recipe(keys, said):
    with pytest.raises(UserError, match=said):
        Recipe.parse({"adapter": keys})


def test_layers_that_the_model_or_the_algorithm_does_not_have_are_refused(tiny_recipe):
    for wanted in ([1, 6], "last-7"):
        with pytest.raises(UserError, match=r"but the model has 6 layers \(0 to 5\)"):
            adapted(layers=wanted)
    with pytest.raises(UserError, match="algorithm that chooses the layers"):
        prepare(tiny_recipe({"algorithm": "fedavg_outer", "adapter.layers": "last-1"}), Watch())


# ------------------------------------------------------------------ what is kept is what is computed


@pytest.mark.parametrize("kind", ["lora", "dropout", "full", "gpt2", "bf16"])
def test_losses_and_gradients_are_those_without_it(kind, tmp_path):
    base = {"gpt2": gpt2}.get(kind, lambda: tiny.causal_lm(num_hidden_layers=6))()
    base = base.to(torch.bfloat16) if kind == "bf16" else base
    model = {
        "full": lambda: attach(Base(base.requires_grad_(False), None, ""), AdapterConfig(method="full", layers=[4]), 0),
    }.get(kind, lambda: adapted(base, dropout=0.3 if kind == "dropout" else 0.0))()
    assert prefix_obstacle(model, packed=True) == ""
    losses, gradient = trained(model)
    assert float(gradient.norm()) > 0
    assert supports_prefix(model)
    model.prefix = PrefixCache(model, tmp_path, MEGABYTE)
    first = trained(model)
    assert model.prefix.computed == BATCH.lengths
    again = trained(model)
    assert model.prefix.computed == ()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if kind != "bf16":  # whose products of other shapes round by more
        torch.testing.assert_close(first[0], losses, rtol=0, atol=1e-5)
    assert float((first[1] - gradient).norm() / gradient.norm()) < (0.05 if kind == "bf16" else 1e-5)
    for spared in ({"recompute": True}, {"chunk": 7}, {"recompute": True, "chunk": 7}):
        other = trained(model, **spared)
        torch.testing.assert_close(other[0], first[0], rtol=0, atol=1e-5)
        assert float((other[1] - first[1]).norm() / gradient.norm()) < (0.05 if kind == "bf16" else 1e-5)


def test_a_state_does_not_depend_on_the_batch_it_was_made_in(tmp_path):
    model = adapted()
    alone = PrefixCache(model).states(model, collate(SEQUENCES[1:2], packed=True, pad=0))
    model.prefix = PrefixCache(model, tmp_path, MEGABYTE)
    assert torch.equal(model.prefix.states(model, BATCH)[:, 30:47], alone)


def test_each_example_goes_through_the_prefix_once(tmp_path):
    model = adapted()
    model.prefix = PrefixCache(model, tmp_path, MEGABYTE)
    count = passes(model)
    for _ in range(3):
        trained(model)
    assert count == [len(SEQUENCES)]
    other = adapted()  # another process on the same base
    other.prefix = PrefixCache(other, tmp_path, MEGABYTE)
    count = passes(other)
    trained(other)
    assert count == [0]


def test_another_base_has_states_of_its_own(tmp_path):
    first, second, upper = (adapted() for _ in range(3))
    with torch.no_grad():
        second.causal_lm.model.layers[2].mlp.up_proj.weight.add_(0.01)
        upper.causal_lm.model.layers[5].mlp.up_proj.base_layer.weight.add_(0.01)
    above = PrefixCache(first)._above
    digests = [prefix_digest(m, above) for m in (first, second, upper)]
    assert digests[0] != digests[1] and digests[0] == digests[2]
    expected = trained(second)
    for model in (first, second):
        model.prefix = PrefixCache(model, tmp_path, MEGABYTE)
        got = trained(model)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)


def test_states_under_autocast_are_apart(tmp_path):
    model = adapted()
    model.prefix = PrefixCache(model, tmp_path, MEGABYTE)
    plain = model.prefix.states(model, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.prefix.states(model, BATCH)
    assert not torch.equal(plain, low)
    assert torch.equal(model.prefix.states(model, BATCH), plain)


def test_a_base_that_an_algorithm_changed_is_computed_as_it_is(tmp_path):
    model = adapted()
    model.prefix = PrefixCache(model, tmp_path, MEGABYTE)
    before, _ = trained(model)
    below, above = (f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 5))
    delta = torch.full_like(model.base_weights()[below], 0.05)
    model.set_base_delta({above: delta})
    assert model.prefix.fits_model(model)
    model.set_base_delta({below: delta})
    changed, _ = trained(model)
    cache, model.prefix = model.prefix, None
    assert torch.equal(trained(model)[0], changed)
    assert float((changed - before).abs().max()) > 1e-2
    model.prefix = cache
    model.set_base_delta(None)
    assert torch.equal(trained(model)[0], before)


# ------------------------------------------------------------------ on disk


def test_the_folder_keeps_to_its_limit_and_old_bases_go_first(tmp_path):
    model = adapted()
    width = model.causal_lm.config.hidden_size
    size = sum(BATCH.lengths) * width * 4
    old = tmp_path / "old"
    old.mkdir()
    (old / "x.safetensors").write_bytes(bytes(size))
    model.prefix = PrefixCache(model, tmp_path, size + 100)
    first = trained(model)
    assert not old.exists()
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(SEQUENCES)
    short = adapted()
    short.prefix = PrefixCache(short, tmp_path / "short", 30 * width * 4)
    second = trained(short)
    assert len(list((tmp_path / "short").rglob("*.safetensors"))) == 1  # the first of them fits, and stays
    again = trained(short)
    assert short.prefix.computed == BATCH.lengths[1:]
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, second, again, strict=True))


def test_a_torn_file_is_computed_again(tmp_path):
    model = adapted()
    model.prefix = PrefixCache(model, tmp_path, MEGABYTE)
    first = trained(model)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    again = trained(model)
    assert torch.equal(first[0], again[0])


# ------------------------------------------------------------------ runs and refusals


def test_a_run_has_the_same_result_in_less_work(tiny_recipe, deep_model, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path / "home"))
    more = {"model": str(deep_model), "adapter.layers": "last-1", "adapter.dropout": 0.1, "train.eps": 1e-4}
    more |= {"train.steps": None, "train.epochs": 1}
    plain = fedloom.run(tiny_recipe(more), out=tmp_path / "plain").summary
    cached = [
        fedloom.run(tiny_recipe({**more, "train.cache_prefix": size}), out=tmp_path / f"{i}").summary
        for i, size in enumerate((64, 64))
    ]
    assert cached[0]["loss"]["after"] == pytest.approx(plain["loss"]["after"], abs=1e-5)
    assert len({c["adapter_sha256"] for c in cached}) == 1  # whatever the cache held
    assert cached[0]["cost"]["train_tokens"] == plain["cost"]["train_tokens"]
    assert cached[1]["cost"]["train_flops"] < cached[0]["cost"]["train_flops"] < 0.75 * plain["cost"]["train_flops"]
    assert list((cache_folder.cache_home() / "prefix").rglob("*.safetensors"))


def test_an_algorithm_that_adds_to_base_weights_has_the_same_result(tiny_recipe, deep_model, tmp_path):
    more = {"algorithm": "fedex_lora", "model": str(deep_model), "adapter.layers": "last-2", "train.eps": 1e-4}
    plain, cached = (
        fedloom.run(tiny_recipe({**more, "train.cache_prefix": size}), out=tmp_path / str(size)).summary
        for size in (None, 8)
    )
    assert cached["loss"]["after"] == pytest.approx(plain["loss"]["after"], abs=2e-5)


def test_what_has_no_frozen_prefix_is_refused(tiny_recipe):
    with pytest.raises(UserError, match=r"train\.cache_prefix=8 cannot be used: something trains in the first"):
        prepare(tiny_recipe({"train.cache_prefix": 8}), Watch())
    layers = {"adapter.layers": "last-1", "train.cache_prefix": 8}
    with pytest.raises(UserError, match="batches are padded"):
        prepare(tiny_recipe({**layers, "train.packing": "off"}), Watch())
    with pytest.raises(UserError, match="starts in the middle of the model"):
        prepare(tiny_recipe({**layers, "train.cohort": 2}), Watch())
    with pytest.raises(UserError, match="which is for one process"):
        prepare(tiny_recipe({**layers, "runtime.ranks": 2}), Watch())
    assert "has dropout below" in prefix_obstacle(adapted(gpt2(resid_pdrop=0.1)), packed=True)
    assert "has dropout below" in prefix_obstacle(adapted(gpt2(embd_pdrop=0.1)), packed=True)
    assert prefix_obstacle(adapted(gpt2(), dropout=0.1), packed=True) == ""


def test_operations_are_those_that_are_done(tmp_path):
    model = adapted(tiny.causal_lm(num_hidden_layers=9, hidden_size=64, intermediate_size=160), layers="last-5")
    for cached in (False, True, True):
        if cached:
            model.prefix = model.prefix or PrefixCache(model, tmp_path, 8 * MEGABYTE)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            token_losses(model, BATCH).sum().backward()
        assert Flops(model).of(BATCH) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_cache_is_cleared_by_name(tmp_path, monkeypatch):
    from fedloom.common.cache_folder import clear_cache

    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path))
    folder = Path(tmp_path / "prefix")
    folder.mkdir()
    assert clear_cache("prefix") == folder and not folder.exists()
