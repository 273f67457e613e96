"""FedDPA: two adapters in one LoRA of twice the rank, whose product is their sum; only one of them travels."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedloom.common.errors import UserError
from fedloom.models.forward import default_peft_model
from fedloom.models.lowrank import LowRank, find_lora_pairs
from tests.helpers.federation import Federation

SGD = {"train.optimizer": "sgd", "train.lr": 0.3, "train.clip": None, "train.schedule": "constant", "train.steps": 3}


def feddpa(recipe, folder, more=None):
    return Federation(recipe({"algorithm.name": "feddpa", **(more or {})}), folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_live_model_is_the_sum_of_both_adapters(tiny_recipe, tmp_path, rslora):
    """ΔW of the live LoRA against s·B_g A_g (as sent) + s·B_k A_k (as kept), in float64; s is that of the recipe."""
    f = feddpa(tiny_recipe, tmp_path, {"train.steps": 4, "adapter.rslora": rslora})
    s = 4 / 2**0.5 if rslora else 4 / 2
    f.round(1)
    f.round(2)
    f.evaluate("copy", 2)
    scales = f.model.lora_scales()
    kept = f.store.load("copy", 2)["personal"].tensors
    for pair in find_lora_pairs(f.model.adapter.views):
        assert scales[pair.weight] == pytest.approx(s, rel=1e-12)
        live = LowRank(f.model.adapter.views[pair.b], f.model.adapter.views[pair.a]).double().dense()
        sent = f.server.shared.views
        terms = [(s, t[pair.b].double(), t[pair.a].double()) for t in (sent, kept)]
        assert all((b @ a).any() for _, b, a in terms)
        assert torch.allclose(s * live, LowRank.stack(terms).dense(), rtol=0, atol=1e-12)


def test_the_global_half_is_fedavg_at_the_recipes_rank(tiny_recipe, tmp_path):
    """From the same start, under SGD: the local half, off, changes nothing but rounding."""
    dual = feddpa(tiny_recipe, tmp_path / "feddpa", SGD)
    plain = Federation(tiny_recipe(SGD), tmp_path / "fedavg")
    plain.server.shared.load(dual.server.shared.tensors())
    assert dual.server.shared.layout == plain.server.shared.layout
    start = plain.server.shared.flat.clone()
    for number in (1, 2):
        dual.round(number)
        plain.round(number)
    moved = (plain.server.shared.flat - start).norm()
    assert (dual.server.shared.flat - plain.server.shared.flat).norm() < 1e-4 * moved


def test_each_half_is_frozen_while_the_other_trains(tiny_recipe, tmp_path):
    """Weight decay on. The local half trains on the global one as it was received, not as this client left it."""
    f = feddpa(tiny_recipe, tmp_path, {"train.steps": 3, "train.weight_decay": 0.1})
    f.round(1)
    server = f.server
    received = {n: t.clone() for n, t in server.shared.tensors().items()}
    halves: list[tuple[dict, dict]] = []

    def watch(self, model):
        views = model.adapter.views
        halves.append(
            ({n: server._global(n, t).clone() for n, t in views.items()},
             {n: server._local(n, t).clone() for n, t in views.items()})
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(server), "before_step", watch)
        update = f.train("copy", 2)
    first, second = halves[:3], halves[3:]
    initial = {n: server._local(n, t) for n, t in f.model.initial_adapter().views.items()}
    for _, local in first:
        assert all(torch.equal(local[n], initial[n]) for n in local)
        assert all(not local[n].any() for n in local if "lora_B" in n)
    for whole, _ in second:
        assert all(torch.equal(whole[n], received[n]) for n in whole)
    assert any(not torch.equal(first[0][0][n], first[2][0][n]) for n in received)
    assert any(not torch.equal(second[0][1][n], second[2][1][n]) for n in received)
    assert any(not torch.equal(update.payload.tensors[n], received[n]) for n in received)


def test_the_local_half_stays_and_goes_on_from_where_it_was(tiny_recipe, tmp_path):
    f = feddpa(tiny_recipe, tmp_path)
    f.round(1)
    kept = f.store.load("copy", 1)["personal"].tensors
    starts: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(f.server), "before_step",
            lambda s, m: starts.append({n: f.server._local(n, t).clone() for n, t in m.adapter.views.items()}),
        )  # fmt: skip
        f.train("copy", 2)
    assert all(torch.equal(starts[2][n], t) for n, t in kept.items())  # two steps of the global half, then its own
    sums = {float(t.double().sum()) for t in kept.values() if t.any()}
    for message in f.messages:
        for payload in (message.down, message.up):
            for n, tensor in (payload.tensors if payload else {}).items():
                assert tensor.shape == f.server.shared.views[n].shape
                assert float(tensor.double().sum()) not in sums


def test_the_saved_adapter_is_an_ordinary_lora_that_peft_loads(tiny_recipe, tiny_model, tmp_path):
    f = feddpa(tiny_recipe, tmp_path)
    f.round(1)
    f.send(f.assignment("save", "copy", 1))
    ids = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = default_peft_model(f.model)(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapters" / "copy"
        )
        assert torch.allclose(loaded(input_ids=ids).logits, ours, atol=1e-5)


def test_a_client_that_never_trained_has_the_global_adapter_alone(tiny_recipe, tmp_path):
    f = feddpa(tiny_recipe, tmp_path)
    f.round(1, ["copy"])
    assert torch.equal(f.evaluated("upper", 1), f.server.deployed().adapter.flat)
    assert not torch.equal(f.evaluated("copy", 1), f.server.deployed().adapter.flat)


def test_traffic_is_that_of_the_recipes_rank(tiny_recipe, tmp_path):
    plain, dual = Federation(tiny_recipe(), tmp_path / "a"), feddpa(tiny_recipe, tmp_path / "b")
    assert {n: t.shape for n, t in dual.train("copy", 1).payload.tensors.items()} == {
        n: t.shape for n, t in plain.train("copy", 1).payload.tensors.items()
    }


def test_more_than_two_factors_are_refused(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match="dora"):
        feddpa(tiny_recipe, tmp_path, {"adapter.dora": True})
