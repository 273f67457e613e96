"""The reference is the model before any training: the same logits whatever was trained since, and nothing left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fedloom.data.batching import collate
from fedloom.models.attach import attach
from fedloom.models.forward import token_losses
from fedloom.models.loading import Base
from fedloom.models.reference import reference
from fedloom.recipe.recipe import AdapterConfig
from tests.helpers import preferences, tiny

METHODS = {
    "lora": {"dropout": 0.5},
    "bias": {"bias": "all"},
    "dora": {"dora": True},
    "adalora": {"method": "adalora"},
    "ia3": {"method": "ia3"},
    "prompt_tuning": {"method": "prompt_tuning", "virtual_tokens": 4},
    "p_tuning": {"method": "p_tuning", "virtual_tokens": 4},
    "prefix_tuning": {"method": "prefix_tuning", "virtual_tokens": 4},
    "full": {"method": "full"},
}


def base(dtype=torch.float32):
    return tiny.causal_lm(attention_bias=True).to(dtype).requires_grad_(False)


def batch(packed=True):
    data = preferences.random_pairs()
    return collate([s for i in range(3) for s in data.pair(i)], packed=packed, pad=0)


def adapted(config, dtype=torch.float32):
    return attach(Base(base(dtype), tiny.tokenizer(), ""), AdapterConfig(**config), 0)


def plain(dtype=torch.float32) -> torch.Tensor:
    """Losses of the base alone, by a LoRA that adds nothing."""
    with torch.no_grad():
        return token_losses(adapted({"rank": 1}, dtype), batch())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_base_and_everything_comes_back(method):
    model = adapted(METHODS[method])
    model.adapter.flat.add_(0.1)
    before, initial = model.adapter.flat.clone(), model.initial.clone()
    flags = {n: p.requires_grad for n, p in model.module.named_parameters()}
    model.module.train()
    with reference(model):
        losses = token_losses(model, batch())
        padded = token_losses(model, batch(packed=False))
        assert not losses.requires_grad and not model.module.training
    assert torch.equal(losses, plain())
    assert torch.allclose(padded, losses, atol=1e-5)
    assert torch.equal(model.adapter.flat, before) and torch.equal(model.initial, initial)
    assert {n: p.requires_grad for n, p in model.module.named_parameters()} == flags and model.module.training
    model.module.eval()
    loss = token_losses(model, batch()).sum()
    assert not torch.allclose(loss, losses.sum(), atol=1e-2)
    loss.backward()
    assert float(model.grad.norm()) > 0  # the windows are still where gradients go


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["in the weights", "beside them"])
def test_a_base_delta_is_no_part_of_it(dtype):
    model = adapted({"rank": 2}, dtype)
    weight = next(n for n in model.base_weights() if n.endswith("q_proj.weight"))
    model.set_base_delta({weight: 0.2 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))})
    with torch.no_grad():
        changed = token_losses(model, batch())
    live = model.base_weights()[weight].clone()
    with reference(model):
        assert torch.equal(token_losses(model, batch()), plain(dtype))
    with torch.no_grad():
        assert torch.equal(token_losses(model, batch()), changed)
    assert torch.equal(model.base_weights()[weight], live)
    assert not torch.allclose(changed, plain(dtype), atol=1e-2)


@pytest.mark.parametrize("config", [{"rank": 2}, {"method": "full"}], ids=["lora", "full"])
def test_it_holds_no_second_copy_of_anything(config):
    model = adapted(config)

    def held() -> int:
        gc.collect()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if isinstance(t, torch.Tensor)
            and t.layout == torch.strided
            and not isinstance(t, FakeTensor)  # another test's, of torch.compile's kind
        }
        return sum(storages.values())

    before = held()
    with reference(model):
        assert held() == before


def test_an_error_inside_leaves_the_model_as_it_was():
    model = adapted({"method": "prefix_tuning", "virtual_tokens": 4})
    before = model.adapter.flat.clone()
    with pytest.raises(KeyError), reference(model):
        raise KeyError
    assert model.virtual_tokens == 4 and model.prefixed and torch.equal(model.adapter.flat, before)
