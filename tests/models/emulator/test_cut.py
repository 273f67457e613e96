"""A thinned decoder against the full one whose dropped layers were made to do nothing: the same numbers, the same names."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from fedloom.common.errors import UserError
from fedloom.models.emulator import shipping
from fedloom.models.emulator.cut import Cut, cut_model, emulate, thin, thin_middle
from fedloom.models.layers import find_layers, restrict_targets
from tests.helpers import tiny
from tests.helpers.decoders import ARCHITECTURES, decoder, some_ids

EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def shipped(model, cut):
    """What a client would build, and the tensors that it was built from."""
    files = shipping.encode_files(model, tiny.tokenizer())
    empty = shipping.build_skeleton(files, cut, torch.float32)
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {n: live[n] for n in shipping.tensor_names(empty)}
    return shipping.fill_skeleton(empty, tensors, files, "cpu").model, tensors


def skipping(model, cut, ids):
    """Logits of the full model with the dropped layers passing their input on: no list is touched."""

    def pass_on(layer, arguments, keywords, output):
        given = arguments[0] if arguments else keywords["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handles = [
        model.get_submodule(f"{cut.path}.{i}").register_forward_hook(pass_on, with_kwargs=True) for i in cut.dropped
    ]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@EVERY
def test_the_untouched_middle_makes_the_full_model_again(architecture):
    model = decoder(architecture)
    built, _ = shipped(model, cut_model(model, 2, 1, 0.0))
    assert torch.equal(built(some_ids()).logits, model(some_ids()).logits)
    assert built.config.num_hidden_layers == 6


@EVERY
def test_a_thinned_model_is_the_full_one_without_what_its_dropped_layers_do(architecture):
    model = decoder(architecture)
    cut = cut_model(model, 2, 1, 0.34)
    assert cut.kept == (2, 4) and cut.dropped == (3,) and cut.emulated == (0, 1, 2, 4, 5)
    ids, full = some_ids(), model(some_ids()).logits
    expected = skipping(model, cut, ids)
    assert not torch.allclose(expected, full, atol=1e-3)
    built, tensors = shipped(model, cut)
    assert torch.equal(built(ids, use_cache=False).logits, expected)
    with emulate(model, cut, {}):
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert torch.equal(model(ids).logits, full)  # put back
    assert not any(n.startswith(cut.prefixes(cut.dropped)) for n in tensors)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt", "bloom", "gpt-neox", "gpt-neo"])
def test_a_thinned_model_generates_with_a_cache_as_without(architecture):
    """A layer that looked for its keys at its old place would find none, or another's."""
    built, _ = shipped(decoder(architecture), cut_model(decoder(architecture), 2, 1, 0.34))
    ids = some_ids(rows=1)
    said = [built.generate(ids, max_new_tokens=6, do_sample=False, use_cache=c, pad_token_id=0) for c in (True, False)]
    assert torch.equal(*said)


@EVERY
def test_every_tensor_keeps_its_name_of_the_full_model(architecture):
    model = decoder(architecture)
    cut = cut_model(model, 1, 2, 0.34)
    built, _ = shipped(model, cut)
    full = dict(model.named_parameters())
    names = [n for n, _ in built.named_parameters()]
    assert all(torch.equal(p, full[n]) for n, p in built.named_parameters())
    assert set(full) - set(names) == {n for n in full if n.startswith(cut.prefixes(cut.dropped))}
    last = f"{cut.path}.5."
    assert {n.removeprefix(last) for n in names if n.startswith(last)}  # the sixth layer, at the fifth place
    assert not any(n.startswith(cut.prefixes([i for i in range(6) if i not in cut.emulated])) for n in names)


def test_weights_put_into_the_middle_get_gradients_and_leave_nothing_behind():
    model = decoder("llama")
    cut = cut_model(model, 1, 1, 0.5)
    name = "model.layers.4.mlp.up_proj.weight"
    original = model.get_parameter(name)
    weight = (2 * original).detach().requires_grad_(True)
    with emulate(model, cut, {name: weight}):
        model(some_ids(), use_cache=False).logits.sum().backward()
    assert weight.grad is not None and weight.grad.any()
    assert model.get_parameter(name) is original and original.grad is None
    assert "weight" not in vars(model.get_submodule("model.layers.4.mlp.up_proj"))


def test_an_error_inside_leaves_the_model_whole():
    model = decoder("gemma2")
    before, lists = model(some_ids()).logits, list(model.config.layer_types)
    with pytest.raises(IndexError), emulate(model, cut_model(model, 1, 1, 0.5), {}):
        model.config.layer_types[4]
    assert model.config.layer_types == lists and model.config.num_hidden_layers == 6
    assert torch.equal(model(some_ids()).logits, before)


def test_undoing_twice_the_same_cut_is_the_model():
    model = decoder("gpt2")
    undo = thin(model, cut_model(model, 2, 2, 0.0))
    assert len(find_layers(model)[1]) == 6
    undo()
    assert type(find_layers(model)[1]) is torch.nn.ModuleList


# ------------------------------------------------------------------ which layers


@pytest.mark.parametrize(
    ("middle", "drop", "kept"),
    [
        (range(2, 8), 0.0, (2, 3, 4, 5, 6, 7)),
        (range(2, 8), 0.5, (2, 5, 7)),
        (range(0, 5), 0.4, (0, 2, 4)),
        (range(1, 2), 0.0, (1,)),
        (range(0, 10), 0.8, (0, 9)),
        (range(0, 10), 0.01, tuple(range(10))),
    ],
)
def test_dropping_is_even_and_keeps_both_ends(middle, drop, kept):
    assert thin_middle(middle, drop) == kept


@pytest.mark.parametrize("size", [7, 11, 26, 28])
@pytest.mark.parametrize("drop", [0.1, 0.2, 0.5, 0.7])
def test_gaps_between_kept_layers_differ_by_one_at_most(size, drop):
    kept = thin_middle(range(size), drop)
    assert len(kept) == size - round(drop * size) and kept[0] == 0 and kept[-1] == size - 1
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1 and min(gaps) >= 1


def test_a_drop_that_leaves_one_layer_is_refused_with_the_most_that_goes():
    with pytest.raises(UserError, match=r"algorithm.drop=0.9 leaves 0 of the middle's 4 layers.*drop=0.5 or less"):
        thin_middle(range(4), 0.9)
    assert len(thin_middle(range(4), 0.5)) == 2


def test_a_shallow_model_and_one_without_a_list_of_layers_are_refused():
    with pytest.raises(
        UserError, match=r"6 layers, but algorithm.bottom=3 and algorithm.top=3 with a middle .* need 7"
    ):
        cut_model(decoder("llama"), 3, 3)
    assert cut_model(decoder("llama"), 3, 3, hide=False).middle == ()
    bare = torch.nn.Linear(2, 2)
    bare.config = decoder("llama").config
    with pytest.raises(UserError, match="keeps its 6 layers in no single list"):
        find_layers(bare)


def test_lora_targets_lie_in_the_outer_layers():
    model = decoder("llama")
    within = Cut("model.layers", 6, 1, 1, (1, 4)).prefixes((0, 5))

    def found(wanted):
        pattern = restrict_targets(model, wanted, within)
        return {n for n, _ in model.named_modules() if re.fullmatch(pattern, n)}

    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(within)}
    assert found("all-linear") == linear and len(linear) == 14
    assert found(["q_proj"]) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 5)}
    assert found(r".*\.5\.mlp\.(up|down)_proj") == {
        f"model.layers.{i}.mlp.{p}_proj" for i in (0, 5) for p in ("up", "down")
    }
    with pytest.raises(UserError, match="matches no linear layer in the layers that train"):
        restrict_targets(model, ["nothing"], within)
