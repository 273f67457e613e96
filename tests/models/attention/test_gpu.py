"""Attention on a GPU, played: which kernel is chosen, and what it is asked, against per-segment SDPA. No GPU is needed."""

from __future__ import annotations

import pytest
import torch

from fedloom.common.errors import UserError
from fedloom.experiment.prepare import prepare
from fedloom.federation.record.run_folder import continued
from fedloom.federation.watch import Watch
from fedloom.models.attach import Models, attach
from fedloom.models.attention import gpu as gpu_attention
from fedloom.models.attention.gpu import PACKED, choose_attention, packed_flash, packed_flex
from fedloom.models.attention.packed import packed_attention
from fedloom.models.forward import supports_packing
from fedloom.models.loading import Base, load_base
from fedloom.models.saved import export_merged, load_adapted
from fedloom.recipe.recipe import AdapterConfig, ModelConfig
from fedloom.training.probes import settle_attention
from tests.helpers import tiny

HALF, WHOLE = torch.bfloat16, torch.float32


@pytest.fixture
def gpu(monkeypatch):
    """A function of (installed packages, compute capability) that plays a GPU."""

    def play(*installed: str, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(gpu_attention.importlib.util, "find_spec", lambda n: object() if n in installed else None)
        monkeypatch.setattr(gpu_attention, "_flash_function", lambda: played_varlen)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return play


def test_auto_is_flash_where_it_can_be_had_and_sdpa_elsewhere(gpu):
    gpu("flash_attn", "triton")
    assert choose_attention("auto", "cuda", HALF) == "flash_attention_2"
    assert choose_attention("auto", "cuda:1", torch.float16) == "flash_attention_2"
    assert choose_attention("auto", "cuda", WHOLE) == "sdpa"
    assert choose_attention("auto", "cpu", HALF) == "sdpa"
    gpu("flash_attn", capability=(7, 5))
    assert choose_attention("auto", "cuda", HALF) == "sdpa"
    gpu("triton")
    assert choose_attention("auto", "cuda", HALF) == "sdpa"
    assert choose_attention("flex", "cuda", WHOLE) == "flex"
    assert choose_attention("sdpa", "cpu", WHOLE) == "sdpa"


@pytest.mark.parametrize(
    ("wanted", "device", "installed", "capability", "dtype", "dropout", "said"),
    [
        ("flash_attention_2", "cpu", ["flash_attn"], (9, 0), HALF, 0.0, "runs only on a GPU, and the model is on cpu"),
        ("flex", "cpu", ["triton"], (9, 0), HALF, 0.0, "runs only on a GPU, and the model is on cpu"),
        ("flash_attention_2", "cuda", [], (9, 0), HALF, 0.0, "the package flash-attn is not installed"),
        ("flash_attention_2", "cuda", ["flash_attn"], (9, 0), WHOLE, 0.0, r"model\.dtype=float32"),
        ("flash_attention_2", "cuda", ["flash_attn"], (7, 5), HALF, 0.0, r"this GPU has 7\.5"),
        ("flex", "cuda", [], (9, 0), HALF, 0.0, "triton, which is not installed"),
        ("flex", "cuda", ["triton"], (9, 0), HALF, 0.1, "has no dropout"),
    ],
)
def test_what_cannot_be_had_is_refused(gpu, wanted, device, installed, capability, dtype, dropout, said):
    gpu(*installed, capability=capability)
    with pytest.raises(UserError, match=rf"model\.attention={wanted} cannot be used: .*{said}"):
        choose_attention(wanted, device, dtype, dropout)


def test_a_flash_attn_that_cannot_be_imported_is_not_there(gpu, monkeypatch):
    def broken():
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2\nmore")

    gpu("flash_attn")
    monkeypatch.setattr(gpu_attention, "_flash_function", broken)
    assert choose_attention("auto", "cuda", HALF) == "sdpa"
    with pytest.raises(UserError, match=r"is installed and cannot be imported \(flash_attn_2.*_ZN3c105ErrorC2\); set "):
        choose_attention("flash_attention_2", "cuda", HALF)


def test_ranks_with_a_sharded_base_choose_for_the_device_that_it_is_moved_to(gpu, tiny_model):
    gpu("flash_attn")
    config = ModelConfig(name=str(tiny_model), dtype="bfloat16", attention="flash_attention_2")
    models = Models(config, AdapterConfig(rank=2), 0, "cuda:1", finish=lambda model: model)
    assert (models.base().attention, models.base().device.type) == ("flash_attention_2", "cpu")


# ------------------------------------------------------------------ what the kernels are asked


class Layer(torch.nn.Module):
    layer_idx = 1


def played_varlen(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size
):  # flash-attn's documentation, by hand
    """[T, heads, d]: causal, aligned to the end of the keys; query i sees keys i + Lk − Lq − left … i + Lk − Lq."""
    assert causal and dropout_p == 0.0 and cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    out = torch.empty_like(q)
    for s in range(len(cu_q) - 1):
        for h in range(q.shape[1]):
            rows, cols = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
            kv = h // (q.shape[1] // k.shape[1])
            scores = q[rows, h] @ k[cols, kv].T * softmax_scale
            lq, lk = scores.shape
            distance = torch.arange(lq)[:, None] + lk - lq - torch.arange(lk)[None, :]
            hidden = (distance < 0) | ((distance > window_size[0]) if window_size[0] >= 0 else False)
            out[rows, h] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[cols, kv]
    return out


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [(9, 4, 7), (6, 6)], ids=str)
@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_it_gives_what_a_call_for_each_segment_gives(monkeypatch, kernel, lengths, window, prefix):
    monkeypatch.setattr(gpu_attention, "_flash_function", lambda: played_varlen)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(lengths), 16, generator=draw) for heads in (4, 2, 2))
    states = (
        [tuple(torch.randn(1, 2, prefix, 16, generator=draw) for _ in range(2)) for _ in range(2)] if prefix else None
    )
    given = {"scaling": 0.3, "segment_lengths": lengths, "sliding_window": window, "prefix_states": states}
    expected, _ = packed_attention(Layer(), q, k, v, None, **given)
    with torch.no_grad():
        found, _ = {"flash": packed_flash, "flex": packed_flex}[kernel](Layer(), q, k, v, None, **given)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kernel", [packed_flash, packed_flex])
def test_queries_and_keys_that_a_rotation_has_promoted_come_in_the_values_dtype(monkeypatch, kernel):
    monkeypatch.setattr(
        gpu_attention, "_flash_function", lambda: played_varlen
    )  # whose products refuse two dtypes, as flash does
    q, k = (torch.randn(1, 2, 8, 16) for _ in range(2))
    with torch.no_grad():
        found, _ = kernel(Layer(), q, k, k.half(), None, scaling=0.3, segment_lengths=(5, 3))
    assert found.dtype == torch.float16


@pytest.mark.parametrize("kernel", [packed_flash, packed_flex])
def test_what_it_cannot_do_is_an_error(kernel):
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="no softcap"):
        kernel(Layer(), x, x, x, None, segment_lengths=(4,), softcap=30.0)
    with pytest.raises(ValueError, match="needs segment_lengths"):
        kernel(Layer(), x, x, x, None)
    with pytest.raises(ValueError, match="no dropout"):
        packed_flex(Layer(), x, x, x, None, dropout=0.1, segment_lengths=(4,))


# ------------------------------------------------------------------ in a model and in a recipe


@pytest.mark.parametrize("name", ["flash_attention_2", "flex"])
def test_a_model_takes_it_and_is_tried(monkeypatch, name):
    monkeypatch.setattr(gpu_attention, "_flash_function", lambda: played_varlen)
    base = tiny.causal_lm().requires_grad_(False)
    model = attach(Base(base, tiny.tokenizer(), "", name), AdapterConfig(rank=2), 0)
    assert supports_packing(model)
    assert model.causal_lm.config._attn_implementation == PACKED[name]
    monkeypatch.setattr(gpu_attention, "_flash_function", lambda: lambda q, *a, **k: q)
    assert supports_packing(model) == (name == "flex")


def test_a_recipe_says_what_was_chosen(tiny_recipe, tiny_model, monkeypatch):
    assert prepare(tiny_recipe(), Watch()).recipe.model.attention == "sdpa"
    with pytest.raises(UserError, match="runs only on a GPU"):
        load_base(ModelConfig(name=str(tiny_model), attention="flex"))
    monkeypatch.setattr("fedloom.models.loading.choose_attention", lambda wanted, *a: "flash_attention_2")
    monkeypatch.setattr(gpu_attention, "_flash_function", lambda: lambda q, *a, **k: q)  # a kernel that is off
    said: list[str] = []
    assert prepare(tiny_recipe(), Watch(say=said.append)).recipe.model.attention == "sdpa"
    assert any("flash_attention_2 does not give this model's losses here" in text for text in said)
    with pytest.raises(UserError, match=r"set model\.attention=sdpa"):
        prepare(tiny_recipe({"model.attention": "flash_attention_2"}), Watch())


def test_it_is_tried_in_the_precision_of_training(monkeypatch):
    seen = set()

    def varlen(q, k, v, *more, **keywords):
        seen.add(v.dtype)
        return played_varlen(q, k, v, *more, **keywords)

    monkeypatch.setattr(gpu_attention, "_flash_function", lambda: varlen)
    base = Base(tiny.causal_lm().requires_grad_(False), tiny.tokenizer(), "", "flash_attention_2")
    assert settle_attention("auto", attach(base, AdapterConfig(rank=2), 0), "bf16") == "flash_attention_2"
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex"])
def test_what_a_run_chose_binds_neither_its_result_nor_its_continuation(kernel, tiny_recipe, tiny_model, tmp_path):
    config = ModelConfig(name=str(tiny_model), attention=kernel)
    attach(load_base(ModelConfig(name=str(tiny_model))), AdapterConfig(rank=2), 0).save(tmp_path / "adapter", "tiny")
    assert load_adapted(config, tmp_path / "adapter", "cpu").base.attention == "sdpa"
    export_merged(config, tmp_path / "adapter", tmp_path / "merged")
    assert load_adapted(config, tmp_path / "merged", "cpu").full
    stored = tiny_recipe({"model.attention": kernel})
    assert continued(stored, tiny_recipe({"model.attention": "sdpa"})).model.attention == "sdpa"
    assert continued(stored, tiny_recipe()).model.attention == kernel
