"""Alignment brings the emulator's hidden states nearer to the full model's, moves nothing else, and heeds its settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.attach import attach
from fedloom.models.emulator.compression import make_compression
from fedloom.models.emulator.cut import cut_model, emulate
from fedloom.models.emulator.distillation import Distillation, align, emulator_loss
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig
from tests.helpers import tiny

SETTINGS = Distillation(lr=3e-3)


@pytest.fixture
def full():
    base = Base(tiny.causal_lm(num_hidden_layers=6).requires_grad_(False), tiny.tokenizer(), "")
    cut = cut_model(base.model, 1, 1, 0.5)
    model = attach(base, AdapterConfig(rank=2, alpha=4), 3, cut.prefixes(cut.outer))
    model.adapter.flat.copy_(0.1 * torch.randn(model.adapter.flat.shape, generator=torch.Generator().manual_seed(7)))
    return model, cut


def batches(count=12, packed=True):
    draw = np.random.default_rng(3)
    made = []
    for _ in range(count):
        rows = [TokenSequence(draw.integers(3, 259, n).astype(np.int32), 2) for n in (9, 14)]
        made.append(collate(rows, packed=packed, pad=0, examples=(0, 1)))
    return made


def middle(model, cut):
    return {n: p for n, p in model.base_weights().items() if n.startswith(cut.prefixes(cut.kept))}


def aligned(model, cut, settings=SETTINGS, kind="drop_layers", data=None):
    compression = make_compression(kind, torch.float32, 4, 0.25)
    latents = compression.latents(middle(model, cut))
    losses = align(model, cut, compression, latents, batches() if data is None else data, settings)
    return losses, compression, latents


@pytest.mark.parametrize("kind", ["drop_layers", "quantize", "low_rank"])
@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, kl=1.0), replace(SETTINGS, layerwise=True)])
def test_the_error_on_other_data_falls(full, kind, settings):
    model, cut = full
    _, compression, latents = aligned(model, cut, settings, kind, batches(24)[4:])
    unseen = batches(24)[0]
    start = compression.render(compression.latents(middle(model, cut)))
    with torch.no_grad():
        before, after = (
            float(emulator_loss(model, cut, w, unseen, settings)) for w in (start, compression.render(latents))
        )
    assert after < 0.95 * before
    assert not any(t.requires_grad or t.grad is not None for t in latents.values())


def test_nothing_but_the_latents_moves(full):
    model, cut = full
    names = dict(model.base.model.named_parameters())
    before = {n: p.detach().clone() for n, p in names.items()}
    adapter = model.adapter.flat.clone()
    aligned(model, cut)
    after = dict(model.base.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(model.adapter.flat, adapter) and not model.grad.any()
    assert model.base.model.config.num_hidden_layers == 6


def test_an_untouched_middle_has_no_error(full):
    model, _ = full
    cut = cut_model(model.base.model, 1, 1, 0.0)
    settings = Distillation(lr=1e-2, kl=1.0, layerwise=True)
    assert float(emulator_loss(model, cut, middle(model, cut), batches(1)[0], settings)) == 0.0


def test_the_error_is_that_of_the_middles_last_hidden_states(full):
    """By hand: the model's own `output_hidden_states`, the relative square error and the divergence."""
    model, cut = full
    batch = batches(1)[0]
    sequences = batch.ids[0].split(list(batch.lengths))

    def forward():
        model.base.model.config._attn_implementation = "sdpa"
        outputs = [model.base.model(s[None], output_hidden_states=True, use_cache=False) for s in sequences]
        states = [[o.hidden_states[i][0] for o in outputs] for i in range(len(outputs[0].hidden_states))]
        return [torch.cat(s) for s in states], torch.cat([o.logits[0] for o in outputs])[batch.where].log_softmax(-1)

    with torch.no_grad():
        wanted, teacher = forward()
        with emulate(model.base.model, cut, {}):
            found, student = forward()
        h, h_hat = wanted[5], found[3]  # the input of the last layer, of six and of four
        error = (h - h_hat).square().mean() / h.square().mean()
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
        first = (wanted[2] - found[2]).square().mean() / wanted[2].square().mean()
    assert cut.kept == (1, 4) and float(first) == 0.0  # the first kept layer is at its own place

    def loss(**values):
        return float(emulator_loss(model, cut, middle(model, cut), batch, Distillation(lr=1, **values)))

    assert loss() == pytest.approx(float(error), rel=1e-4)
    assert loss(kl=0.5) == pytest.approx(float(error + 0.5 * kl), rel=1e-4)
    assert loss(layerwise=True) == pytest.approx(float(error) / 2, rel=1e-4)


def test_padded_batches_count_real_tokens_alone(full):
    model, cut = full
    settings = replace(SETTINGS, kl=0.5)
    packed, padded = (
        float(emulator_loss(model, cut, middle(model, cut), batches(1, packed=p)[0], settings)) for p in (True, False)
    )
    assert packed == pytest.approx(padded, rel=1e-4)


@pytest.mark.parametrize("other", [{"lr": 1e-3}, {"kl": 0.5}, {"layerwise": True}, {"clip": 1e-3}])
def test_each_setting_changes_the_result(full, other):
    model, cut = full
    same, changed = (aligned(model, cut, s, data=batches(3))[2] for s in (SETTINGS, replace(SETTINGS, **other)))
    again = aligned(model, cut, data=batches(3))[2]
    assert all(torch.equal(same[n], again[n]) for n in same)
    assert not all(torch.allclose(same[n], changed[n], atol=1e-6) for n in same)
