"""A model in a message: tied weights once, files inside their folder, and nothing missing or foreign."""

from __future__ import annotations

import pytest
import torch

from fedloom.common.errors import UserError
from fedloom.models.emulator import shipping
from fedloom.models.emulator.cut import cut_model
from tests.helpers import tiny
from tests.helpers.decoders import decoder, some_ids


@pytest.fixture
def parcel():
    model = decoder("llama-tied")
    cut = cut_model(model, 1, 1, 0.5)
    files = shipping.encode_files(model, tiny.tokenizer("{{ messages[0]['content'] }}"))
    empty = shipping.build_skeleton(files, cut, torch.float32)
    live = dict(model.named_parameters())
    return model, files, empty, {n: live[n] for n, _ in empty.named_parameters()}


def test_a_skeleton_has_no_weights_and_its_computed_buffers(parcel):
    _, _, empty, _ = parcel
    assert all(p.is_meta for p in empty.parameters())
    assert not any(b.is_meta for b in empty.buffers())


def test_tied_weights_travel_once_and_are_tied_again(parcel):
    model, files, empty, tensors = parcel
    assert "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors
    built = shipping.fill_skeleton(empty, tensors, files, "cpu").model
    assert built.lm_head.weight is built.model.embed_tokens.weight
    assert torch.equal(built.lm_head.weight, model.lm_head.weight)
    assert built.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()  # nothing is shared with the message


def test_the_tokenizer_is_the_senders(parcel):
    _, files, _, _ = parcel
    built, sent = shipping.decode_tokenizer(files), tiny.tokenizer("{{ messages[0]['content'] }}")
    text = "ant bee: Zürich"
    assert built(text)["input_ids"] == sent(text)["input_ids"]
    assert built.chat_template == sent.chat_template
    assert (built.pad_token_id, built.eos_token_id, built.padding_side) == (0, 2, "left")


@pytest.mark.parametrize("name", ["tokenizer/../escaped", "tokenizer//etc/escaped", "tokenizer/"])
def test_a_file_that_leads_out_of_its_folder_is_refused(parcel, name):
    _, files, _, _ = parcel
    with pytest.raises(ValueError, match="leads out of the tokenizer's folder"):
        shipping.decode_tokenizer({**files, name: torch.zeros(3, dtype=torch.uint8)})


def test_missing_foreign_and_misshapen_tensors_are_named(parcel):
    _, files, empty, tensors = parcel
    name = "model.layers.5.mlp.up_proj.weight"
    without = {n: t for n, t in tensors.items() if n != name}
    with pytest.raises(ValueError, match=rf"missing: \['{name}'\], unexpected: \[\]"):
        shipping.fill_skeleton(empty, without, files, "cpu")
    by_position = {**without, "model.layers.3.mlp.up_proj.weight": tensors[name]}
    with pytest.raises(ValueError, match=r"unexpected: \['model.layers.3.mlp.up_proj.weight'\]"):
        shipping.fill_skeleton(empty, by_position, files, "cpu")
    with pytest.raises(ValueError, match=f"{name} has the shape "):
        shipping.fill_skeleton(empty, {**tensors, name: tensors[name].T}, files, "cpu")


def test_sixteen_bits_arrive_as_sixteen_bits(parcel):
    model, files, _, tensors = parcel
    empty = shipping.build_skeleton(files, cut_model(model, 1, 1, 0.5), torch.bfloat16)
    built = shipping.fill_skeleton(empty, {n: t.bfloat16() for n, t in tensors.items()}, files, "cpu").model
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    assert built.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(built(some_ids()).logits).all()


def test_a_models_own_code_does_not_travel():
    class Homemade(type(decoder("llama"))):
        pass

    with pytest.raises(UserError, match="Homemade is no architecture of transformers itself"):
        shipping.check_shippable(Homemade(decoder("llama").config))
