"""The live buffer, peft's format on disk, and base-weight deltas that come and go without a trace."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fedloom.common.errors import UserError
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models, attach
from fedloom.models.loading import Base, load_base, pick_device
from fedloom.models.saved import export_merged, load_adapted, load_base_delta, save_base_delta
from fedloom.recipe.recipe import AdapterConfig, ModelConfig
from tests.helpers import tiny

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32, **adapter) -> AdaptedModel:
    base = tiny.causal_lm().to(dtype).requires_grad_(False)
    return attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(**{"rank": 2, "alpha": 4, **adapter}), seed)


def scrambled(model: AdaptedModel, seed: int = 1) -> AdaptedModel:
    """With numbers in A and B that do something (peft's B starts at zero)."""
    draw = torch.Generator().manual_seed(seed)
    model.adapter.flat.copy_(0.1 * torch.randn(model.adapter.layout.numel, generator=draw))
    return model


@torch.no_grad()
def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def weights_of(model: AdaptedModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.base.model.named_parameters() if "lora_" not in n}


# ------------------------------------------------------------------ the live buffer


def test_every_trainable_parameter_is_a_window_into_the_flat_buffer():
    model = adapted()
    trainable = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    assert len(trainable) == len(model.adapter.layout.names) == 2 * 2 * 7  # A and B, two layers, seven linears
    lowest, highest = model.adapter.flat.data_ptr(), model.adapter.flat.data_ptr() + 4 * model.adapter.layout.numel
    for name, parameter in trainable.items():
        assert lowest <= parameter.data_ptr() < highest
        assert torch.equal(parameter, model.adapter.views[name.replace(".default", "")])
    assert sum(p.numel() for p in trainable.values()) == model.adapter.layout.numel
    assert all(t.dtype == torch.float32 for t in model.adapter.views.values())


def test_writing_into_the_flat_buffer_changes_the_model_and_back():
    model = adapted()
    before = logits(model.module)
    assert torch.equal(before, logits(tiny.causal_lm()))  # B = 0: the adapter starts as nothing
    scrambled(model)
    assert not torch.allclose(logits(model.module), before, atol=1e-3)
    model.adapter.copy_(model.initial)
    assert torch.equal(logits(model.module), before)


def test_gradients_add_up_in_the_flat_gradient():
    model = scrambled(adapted())
    model.module(input_ids=IDS, labels=IDS).loss.backward()
    once = model.grad.clone()
    views = model.adapter.layout.views(model.grad)
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.data_ptr() == views[name.replace(".default", "")].data_ptr()
    model.module(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.allclose(model.grad, 2 * once)
    assert float(once.norm()) > 0
    assert model.parameter.grad.data_ptr() == model.grad.data_ptr()


def test_the_start_comes_from_the_seed_and_not_from_the_global_generator():
    torch.manual_seed(1)
    a = adapted(seed=3).initial
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = adapted(seed=3).initial
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)  # and nobody else's numbers change because of it
    assert not torch.equal(a, adapted(seed=4).initial)


def test_the_adapter_of_a_16_bit_base_is_fp32():
    model = adapted(dtype=torch.bfloat16)
    assert model.adapter.flat.dtype == torch.float32
    assert {p.dtype for n, p in model.module.named_parameters() if "lora_" in n} == {torch.float32}
    scrambled(model).module(input_ids=IDS, labels=IDS).loss.backward()
    assert float(model.grad.norm()) > 0


def test_initial_adapter_is_a_copy():
    model = adapted()
    copy = model.initial_adapter()
    scrambled(model)
    assert torch.equal(copy.flat, model.initial)
    assert copy.sha256() == adapted().initial_adapter().sha256()


def test_all_linear_leaves_out_the_head_and_the_embeddings():
    names = adapted().adapter.layout.names
    assert not [n for n in names if "lm_head" in n or "embed" in n]
    only = adapted(target_modules=["q_proj"]).adapter.layout.names
    assert len(only) == 4
    assert all(".q_proj." in n for n in only)


def test_a_target_that_no_module_has_is_a_users_mistake():
    with pytest.raises(UserError, match=r"adapter\.target_modules"):
        adapted(target_modules=["nosuch"])


def test_models_makes_one_base_and_one_adapter_a_process(tiny_model):
    models = Models(ModelConfig(name=str(tiny_model)), AdapterConfig(rank=2), 0)
    assert models.adapted() is models.adapted()
    assert models.base() is models.adapted().base


# ------------------------------------------------------------------ loading and saving


def test_a_base_is_frozen_and_its_embedding_keeps_its_size(tiny_model):
    base = load_base(ModelConfig(name=str(tiny_model)))
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert base.model.get_input_embeddings().weight.shape[0] == tiny.VOCABULARY != len(base.tokenizer)
    assert torch.equal(logits(base.model), logits(tiny.causal_lm()))


def test_a_missing_pad_token_takes_an_existing_row(tmp_path):
    tiny.causal_lm().save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    base = load_base(ModelConfig(name=str(tmp_path)))
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 2
    assert base.model.get_input_embeddings().weight.shape[0] == tiny.VOCABULARY


def test_a_tokenizer_larger_than_the_embedding_is_refused_not_resized(tmp_path):
    tiny.save_model(tmp_path, tiny.causal_lm(vocab_size=100))
    with pytest.raises(UserError, match=r"259 tokens, but its embedding only 100 rows"):
        load_base(ModelConfig(name=str(tmp_path)))


def test_tied_embeddings_stay_tied(tmp_path):
    tiny.save_model(tmp_path, tiny.causal_lm(tie_word_embeddings=True))
    model = attach(load_base(ModelConfig(name=str(tmp_path))), AdapterConfig(rank=2), 0)
    base = model.base.model
    assert base.get_output_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_loaded_in_the_recipes_dtype(tiny_model, dtype):
    base = load_base(ModelConfig(name=str(tiny_model), dtype=dtype))
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2-135", "did you mean smollm2-135m"),
        ("/no/such/folder", "no model folder"),
        ("./nowhere", "no model folder"),
    ],
)
def test_an_unknown_model_is_a_users_mistake(name, said):
    with pytest.raises(UserError, match=said):
        load_base(ModelConfig(name=name))


def test_a_folder_without_a_model_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_base(ModelConfig(name=str(tmp_path)))


def test_a_device_that_is_not_there_is_a_users_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="no GPU"):
        pick_device("cuda")
    with pytest.raises(UserError, match="is no device"):
        pick_device("abacus")


def test_a_saved_adapter_loads_with_peft_and_gives_the_same_logits(tmp_path):
    model = scrambled(adapted())
    model.save(tmp_path, "the/base")
    loaded = PeftModel.from_pretrained(tiny.causal_lm(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(model.module))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the/base"
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    saved = load_file(str(tmp_path / "adapter_model.safetensors"))
    assert sorted(saved) == list(model.adapter.layout.names)  # names on the wire are peft's own


def test_load_adapted_gives_the_same_model_and_buffer(tiny_model, tmp_path):
    model = scrambled(adapted())
    model.save(tmp_path, str(tiny_model))
    loaded = load_adapted(ModelConfig(name=str(tiny_model)), tmp_path, "cpu")
    assert loaded.adapter.sha256() == model.adapter.sha256()
    assert torch.equal(logits(loaded.module), logits(model.module))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapted(ModelConfig(name=str(tiny_model)), tmp_path / "nothing", "cpu")


@pytest.mark.parametrize("with_delta", [False, True])
def test_an_export_with_merged_weights_gives_the_adapters_logits(tiny_model, tmp_path, with_delta):
    model = scrambled(adapted())
    model.save(tmp_path / "adapter", str(tiny_model))
    if with_delta:
        delta = {Q: 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(2))}
        save_base_delta(tmp_path / "adapter", delta)
        model.set_base_delta(delta)
    export_merged(ModelConfig(name=str(tiny_model)), tmp_path / "adapter", tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(plain, "peft_config")
    assert torch.allclose(logits(plain), logits(model.module), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(plain), logits(tiny.causal_lm()), atol=1e-3)
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()


# ------------------------------------------------------------------ base-weight deltas


def factors(seed: int = 0, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(32, rank, generator=draw), torch.randn(rank, 32, generator=draw)


def test_a_delta_is_added_to_the_loaded_weights_and_none_puts_every_bit_back():
    model = scrambled(adapted())
    before, start = weights_of(model), logits(model.module)
    b, a = factors()
    model.set_base_delta({Q: b @ a})
    inner = dict(model.base.model.named_parameters())["model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert torch.equal(inner, before["model.layers.0.self_attn.q_proj.base_layer.weight"] + b @ a)
    assert not torch.allclose(logits(model.module), start, atol=1e-3)
    for _ in range(3):  # set again, it is not added twice
        model.set_base_delta({Q: b @ a})
    assert torch.equal(inner, before["model.layers.0.self_attn.q_proj.base_layer.weight"] + b @ a)
    model.set_base_delta(None)
    assert all(torch.equal(p, before[n]) for n, p in weights_of(model).items())
    assert torch.equal(logits(model.module), start)


def test_another_delta_replaces_the_one_before():
    model = adapted()
    before = weights_of(model)
    b, a = factors()
    model.set_base_delta({Q: b @ a})
    model.set_base_delta({UP: torch.ones(64, 32)})
    after = weights_of(model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"model.layers.1.mlp.up_proj.base_layer.weight"}
    model.set_base_delta({})
    assert all(torch.equal(p, before[n]) for n, p in weights_of(model).items())


def test_factors_give_what_their_product_gives():
    dense, low_rank = adapted(), adapted()
    b, a = factors()
    dense.set_base_delta({Q: b @ a})
    low_rank.set_base_delta({f"{Q}.B": b, f"{Q}.A": a})
    assert torch.equal(logits(dense.module), logits(low_rank.module))


def test_a_weight_without_an_adapter_on_it_can_change_too():
    model = adapted(target_modules=["v_proj"])
    model.set_base_delta({Q: torch.ones(32, 32)})
    plain = tiny.causal_lm()
    with torch.no_grad():
        plain.model.layers[0].self_attn.q_proj.weight += 1
    assert torch.equal(logits(model.module), logits(plain))


def test_into_16_bit_weights_a_delta_is_summed_in_fp32_and_rounded_once():
    model = adapted(dtype=torch.bfloat16)
    before = weights_of(model)["model.layers.0.self_attn.q_proj.base_layer.weight"]
    b, a = factors(rank=4)
    b, a = (0.05 * b).bfloat16(), a.bfloat16()
    model.set_base_delta({f"{Q}.B": b, f"{Q}.A": a}, into_weights=True)
    after = weights_of(model)["model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, (before.float() + b.float() @ a.float()).bfloat16())
    assert not torch.equal(after, before + b @ a)  # the control: the same in 16 bits is another number
    model.set_base_delta(None)
    assert torch.equal(weights_of(model)["model.layers.0.self_attn.q_proj.base_layer.weight"], before)


@pytest.mark.parametrize(
    "delta",
    [
        {Q: torch.ones(32, 32), "model.layers.9.self_attn.q_proj.weight": torch.ones(32, 32)},
        {Q: torch.ones(32, 32), "model.layers.0.self_attn.q_proj.base_layer.weight": torch.ones(32, 32)},
        {Q: torch.ones(32, 32), UP: torch.ones(1, 32)},  # would be broadcast without a word
        {Q: torch.ones(32, 32), UP: torch.ones(32, 64)},
        {Q: torch.ones(32, 32), f"{UP}.B": torch.ones(64, 2)},
        {Q: torch.ones(32, 32), f"{UP}.B": torch.ones(64, 2), f"{UP}.A": torch.ones(3, 32)},
    ],
    ids=["no such layer", "the wrapper's name", "broadcast", "transposed", "half of a pair", "ranks differ"],
)
def test_a_delta_that_does_not_fit_is_refused_whole(delta):
    model = adapted()
    before = weights_of(model)
    with pytest.raises(ValueError, match="base"):
        model.set_base_delta(delta)
    assert all(torch.equal(p, before[n]) for n, p in weights_of(model).items())


def test_a_delta_on_a_quantised_weight_is_refused():
    model = adapted()
    weight = dict(model.base.model.named_parameters())["model.embed_tokens.weight"]
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(ValueError, match="quantised"):
        model.set_base_delta({"model.embed_tokens.weight": torch.zeros(300, 32)})


def test_deltas_on_disk(tmp_path):
    assert load_base_delta(tmp_path) is None
    b, a = factors()
    save_base_delta(tmp_path, {f"{Q}.B": b.T.contiguous().T, f"{Q}.A": a})
    loaded = load_base_delta(tmp_path)
    assert torch.equal(loaded[f"{Q}.B"], b)
    assert torch.equal(loaded[f"{Q}.A"], a)


def test_a_delta_is_out_by_in_however_the_weight_is_stored():
    """GPT-2's Conv1D keeps [in, out]; LoRA's factors and so a delta do not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4)).eval().requires_grad_(False)
    model = attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(rank=2, target_modules=["c_attn"]), 0)
    name = "transformer.h.0.attn.c_attn.weight"
    layer = dict(base.named_modules())["transformer.h.0.attn.c_attn.base_layer"]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    plain = layer(x)
    draw = torch.Generator().manual_seed(2)
    b, a = torch.randn(96, 3, generator=draw), torch.randn(3, 32, generator=draw)
    for delta in ({name: b @ a}, {f"{name}.B": b, f"{name}.A": a}):
        model.set_base_delta(delta)
        assert torch.allclose(layer(x), plain + x @ (b @ a).T, atol=1e-4)
    with pytest.raises(ValueError, match="base"):
        model.set_base_delta({name: torch.ones(32, 96)})
    model.set_base_delta(None)
    assert torch.equal(layer(x), plain)


def test_beside_16_bit_weights_a_delta_loses_nothing(tiny_model):
    """Rounded into bfloat16 weights a small delta is mostly lost; the layer's output gets it in fp32 instead."""
    models = Models(ModelConfig(name=str(tiny_model), dtype="bfloat16"), AdapterConfig(rank=2, alpha=4), 0)
    model = models.adapted()
    before = weights_of(model)
    layer = dict(model.base.model.named_modules())["model.layers.0.self_attn.q_proj.base_layer"]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = layer(x).float()
    b, a = factors()
    small = {"B": 1e-3 * b, "A": a}
    for delta in ({f"{Q}.{n}": t for n, t in small.items()}, {Q: small["B"] @ small["A"]}):
        model.set_base_delta(delta)
        assert all(torch.equal(p, before[n]) for n, p in weights_of(model).items())
        expected = (plain + x.float() @ (small["B"] @ small["A"]).T).bfloat16().float()
        assert torch.allclose(layer(x).float(), expected, atol=1e-6, rtol=1e-2)  # one rounding of the sum
        model.set_base_delta(delta)  # set again, it is not added twice
        assert torch.allclose(layer(x).float(), expected, atol=1e-6, rtol=1e-2)
    large = {Q: b @ a}
    model.set_base_delta(large)
    moved = layer(x).float() - plain
    assert moved.norm() == pytest.approx(float((x.float() @ (b @ a).T).norm()), rel=2e-2)
    model.set_base_delta(None)
    assert torch.equal(layer(x).float(), plain)
    model.set_base_delta(large, into_weights=True)
    assert torch.equal(
        weights_of(model)["model.layers.0.self_attn.q_proj.base_layer.weight"],
        (before["model.layers.0.self_attn.q_proj.base_layer.weight"].float() + b @ a).bfloat16(),
    )
