"""Every PEFT method, against peft's own padded forward, its own generation and its own start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from fedloom import run
from fedloom.data.batching import collate
from fedloom.data.corpus import Example
from fedloom.data.prompts import Template
from fedloom.data.tokenization import TokenSequence
from fedloom.evaluation.score import generate
from fedloom.federation.watch import Watch
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.forward import plain_attention, supports_packing, token_losses
from fedloom.models.loading import Base, load_base
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, Recipe
from tests.helpers import tiny
from tests.helpers.peft_by_hand import (
    ARCHITECTURES,
    SMALL,
    TOKENS,
    VARIANTS,
    VIRTUAL,
    WIDTH,
    V,
    attached,
    moved,
    padded_reference,
    plain_peft,
    sequences,
    together,
)

# ------------------------------------------------------------------ forward and backward


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_first_gradient_are_pefts_own(architecture, variant, packed):
    model = moved(attached(variant, architecture))
    assert supports_packing(model)
    losses = token_losses(model, together(packed))
    losses.mean().backward()
    wrapped, parameters = plain_peft(variant, model, architecture)
    expected = padded_reference(wrapped)
    expected.mean().backward()
    assert torch.allclose(losses, expected, atol=1e-5, rtol=1e-5)
    flat = torch.cat([parameters[n].grad.flatten() for n in model.adapter.layout.names])
    assert float((model.grad - flat).norm()) <= 1e-5 * float(flat.norm())
    assert float(flat.norm()) > 0.01


@pytest.mark.parametrize("variant", VIRTUAL)
def test_packed_neighbours_do_not_change_a_sequences_losses(variant):
    """One prompt serves all segments; none of them sees another's."""
    model = moved(attached(variant))
    a, b, c, _ = sequences()
    alone = token_losses(model, collate([b], packed=True, pad=3))
    between = token_losses(model, collate([a, b, c], packed=True, pad=3))
    assert torch.allclose(between[a.supervised : a.supervised + b.supervised], alone, atol=1e-5)


@pytest.mark.parametrize("variant", VIRTUAL)
def test_every_trained_tensor_of_a_prompt_is_in_the_buffer_and_gets_a_gradient(variant):
    model = moved(attached(variant))
    token_losses(model, together()).mean().backward()
    expected = {
        "prompt_tuning": ["embedding.weight"],
        "prefix_tuning": ["embedding.weight"],
        "p_tuning": ["embedding.weight", *(f"mlp_head.{i}.{w}" for i in (0, 2, 4) for w in ("bias", "weight"))],
        "prefix_projection": ["embedding.weight", *(f"transform.{i}.{w}" for i in (0, 2) for w in ("bias", "weight"))],
    }[variant]
    assert list(model.adapter.layout.names) == [f"prompt_encoder.{n}" for n in expected]
    assert all(float(g.norm()) > 0 for g in model.adapter.layout.views(model.grad).values())


@pytest.mark.parametrize("window", [4, 7, 64])
def test_a_prefix_meets_a_sliding_window_as_in_pefts_forward(window):
    config = transformers.MistralConfig(
        **{**SMALL, **TOKENS, "intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": window}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    base.eval().requires_grad_(False)
    model = moved(attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(**VARIANTS["prefix_tuning"]), 5))
    assert supports_packing(model)
    assert torch.allclose(token_losses(model, together()), token_losses(model, together(False)), atol=1e-5)


def test_a_model_that_cannot_be_packed_is_padded_and_says_so(tmp_path, tiny_recipe):
    config = transformers.BloomConfig(vocab_size=300, hidden_size=WIDTH, n_layer=2, n_head=4, initializer_range=0.2)
    base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tiny.save_model(tmp_path / "bloom", base)
    told: list[str] = []
    result = run(
        tiny_recipe(
            {
                "model": str(tmp_path / "bloom"),
                "adapter.method": "prefix_tuning",
                "adapter.virtual_tokens": V,
                "federation.rounds": 1,
            }
        ),
        tmp_path / "run",
        watch=Watch(say=told.append),
    )
    assert Recipe.load(result.folder / "recipe.yaml").train.packing == "off"
    assert any("batches are padded" in text for text in told)


# ------------------------------------------------------------------ the start


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_and_a_prefix_of_words_start_as_those_words_in_front(architecture):
    """Prompt: their embeddings; prefix: the base's own keys and values. Both are the base reading the words first."""
    words = "What follows?"
    ids = tiny.tokenizer()(words, add_special_tokens=False)["input_ids"]
    in_front = [
        TokenSequence(np.concatenate([ids, s.ids]).astype(np.int32), s.prompt + len(ids)) for s in sequences()[:3]
    ]
    with torch.no_grad():
        plain = attached("lora", architecture)
        expected = token_losses(plain, collate(in_front, packed=True, pad=3))
        for variant in ("prompt_tuning", "prefix_tuning"):
            model = attached(variant, architecture, init="text", init_text=words, virtual_tokens=len(ids))
            got = token_losses(model, collate(sequences()[:3], packed=True, pad=3))
            assert torch.allclose(got, expected, atol=1e-5, rtol=1e-5), variant


@pytest.mark.parametrize("length", [3, 29])
def test_init_text_is_cut_or_repeated(length):
    model = attached("prompt_tuning", init="text", init_text="abcdefgh", virtual_tokens=length)
    ids = tiny.tokenizer()("abcdefgh" * 4, add_special_tokens=False)["input_ids"][:length]
    assert torch.equal(model.adapter.flat.view(length, WIDTH), model.causal_lm.get_input_embeddings().weight[ids])


def test_tokens_are_drawn_from_the_seed_and_are_not_special():
    one, again, other = (attached("prompt_tuning", seed=s, virtual_tokens=200) for s in (1, 1, 2))
    assert torch.equal(one.adapter.flat, again.adapter.flat)
    assert not torch.equal(one.adapter.flat, other.adapter.flat)
    table = one.causal_lm.get_input_embeddings().weight
    rows = {int((table == row).all(1).nonzero()) for row in one.adapter.flat.view(200, WIDTH)}
    assert len(rows) > 50 and not rows & {0, 1, 2}


def test_random_starts_are_of_the_size_of_what_they_stand_for():
    prompt = attached("prompt_tuning", init="random", virtual_tokens=300)
    assert float(prompt.adapter.flat.std()) == pytest.approx(
        float(prompt.causal_lm.get_input_embeddings().weight.std()), rel=0.05
    )
    prefix = attached("prefix_tuning", init="random", virtual_tokens=300)
    assert float(prefix.adapter.flat.std()) == pytest.approx(0.02, rel=0.05)


def test_a_real_model_is_not_thrown_off_by_fresh_virtual_tokens(smollm2):
    """peft's own N(0, 1) start costs a prefix many nats."""
    base = load_base(ModelConfig(name=str(smollm2)))  # virtual tokens leave the base as it is, so it serves them all
    ids = base.tokenizer("The capital of France is Paris, and the capital of Italy is Rome.")["input_ids"]
    batch = collate([TokenSequence(np.array(ids, dtype=np.int32), 1)], packed=True, pad=3)

    @torch.no_grad()
    def loss(model: AdaptedModel) -> float:
        return float(token_losses(model, batch).mean())

    started = {}
    for method in ("prompt_tuning", "prefix_tuning"):
        for init in ({}, {"init": "random"}, {"init": "text", "init_text": "Answer."}):
            model = attach(base, AdapterConfig(method=method, **init), 42)
            started[method, *init.values()] = loss(model)
    model.adapter.flat.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0))
    thrown = loss(model)
    alone = loss(attach(base, AdapterConfig(), 42))
    assert {k: v for k, v in started.items() if v > alone + 1.5} == {}
    assert thrown > alone + 4.0


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(VIRTUAL)))
def test_what_changes_weights_starts_as_the_base(variant):
    expected = token_losses(attached("lora"), together())
    assert torch.allclose(token_losses(attached(variant), together()), expected, atol=1e-5)


# ------------------------------------------------------------------ generation

QUESTIONS = [Example(q, "", "", "") for q in ("count: ant bee", "x", "a much longer question about owls and pigs")]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_pefts_own_one_by_one_and_do_not_depend_on_the_batch(architecture, variant):
    model = moved(attached(variant, architecture), by=0.1)
    template = Template(model.tokenizer, "plain")
    expected = []
    model.causal_lm.config._attn_implementation = plain_attention(model)
    for question in QUESTIONS:
        ids = torch.tensor([template.prompt_ids(question)])
        out = model.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        said = out[0, ids.shape[1] :] if out.shape[1] > 12 else out[0]
        expected.append(model.tokenizer.decode(said, skip_special_tokens=True).strip())
    for size in (1, 3):
        got = generate(model, template, QUESTIONS, batch_size=size, max_length=96, max_new_tokens=12)
        assert got == expected, size
    assert len(set(expected)) > 1


@pytest.mark.parametrize("variant", VIRTUAL)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_continues_what_training_saw(architecture, variant):
    """Greedy tokens are the argmax of the packed forward at the question's last position."""
    model = moved(attached(variant, architecture), by=0.1)
    template = Template(model.tokenizer, "plain")
    answers = generate(model, template, QUESTIONS, batch_size=3, max_length=96, max_new_tokens=1)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        prompt = template.prompt_ids(question)
        candidates = [TokenSequence(np.array([*prompt, token], dtype=np.int32), len(prompt)) for token in range(3, 259)]
        with torch.no_grad():
            losses = torch.cat(
                [token_losses(model, collate(candidates[i : i + 64], packed=True, pad=3)) for i in range(0, 256, 64)]
            )
        assert model.tokenizer.decode([3 + int(losses.argmin())]).strip() == answer
