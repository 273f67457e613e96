"""A GGUF file holds the merged model: held against what was merged, tensor by tensor, and against transformers' own
reader of GGUF files, which puts names, rows and tokenizer back by rules of its own. llama.cpp itself: tests/llama_cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    Qwen2Config,
)

from fedloom import run
from fedloom.common.errors import UserError
from fedloom.models.attach import attach
from fedloom.models.gguf.model import find_architecture, write_gguf
from fedloom.models.gguf.vocabulary import Vocabulary
from fedloom.models.loading import Base, quiet_transformers
from fedloom.models.saved import export_gguf, export_merged
from fedloom.recipe.adapter import AdapterConfig
from fedloom.recipe.recipe import ModelConfig, Recipe
from fedloom.reporting.export import export_run
from tests.helpers import tiny
from tests.helpers.gguf_models import ROWS, model_of, saved

TEXTS = ["copy: ant bee 12345", "def f(x):\n    return x + 1  # äöü ☃ 🐍\n", "  two  spaces\t7 77", "<s>owl</s>", ""]


def adapter_of(base: Path, folder: Path, **more: Any) -> Path:
    """An adapter with random numbers in it, for the model in `base`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    made = attach(
        Base(model, AutoTokenizer.from_pretrained(base), ""), AdapterConfig(**(more or {"rank": 2, "alpha": 4})), 0
    )
    made.adapter.flat.copy_(0.3 * torch.randn(len(made.adapter.flat), generator=torch.manual_seed(1)))
    made.save(folder, str(base))
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 60, 300, 7, 7, 410, 33, 4]])
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids).logits
    return out


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_transformers_reads_back_the_merged_model(kind, more, tmp_path):
    base = saved(tmp_path / "base", model_of(kind, **more))
    adapter, config = adapter_of(base, tmp_path / "adapter"), ModelConfig(name=str(base))
    export_merged(config, adapter, tmp_path / "merged")
    export_gguf(config, adapter, tmp_path / "model.gguf", "f32", "tiny")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert float((logits(merged) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 0.1
    if (
        not more.get("mlp_bias") and kind != "qwen3"
    ):  # its reader takes no biases of llama and no width of heads of qwen3
        with quiet_transformers():
            again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        assert torch.allclose(logits(again), logits(merged), atol=1e-6)
    assert_holds(tmp_path / "model.gguf", merged, kind)


def assert_holds(path: Path, merged: Any, kind: str) -> None:
    """Names and numbers of every tensor; the order of rows of q and k written out by hand."""
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    arch = find_architecture(merged.config)
    names = gguf.get_tensor_name_map(arch.name, merged.config.num_hidden_layers)
    expected = dict(merged.state_dict())
    if merged.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert len(found) == len(expected)
    for name, tensor in expected.items():
        numbers = gguf.dequantize(
            found[names.get_name(name, try_suffixes=(".weight", ".bias"))].data, gguf.GGMLQuantizationType.F32
        )
        width = merged.config.head_dim
        if kind in {"llama", "mistral"} and ("q_proj" in name or "k_proj" in name):
            order = [
                h * width + i + half
                for h in range(len(tensor) // width)
                for i in range(width // 2)
                for half in (0, width // 2)
            ]
            tensor = tensor[order]
        np.testing.assert_array_equal(numbers.reshape(tensor.shape), tensor.numpy())


def fields(path: Path) -> dict[str, Any]:
    return {
        name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF")
    }


def test_the_header_says_what_the_configuration_says(tmp_path):
    model = model_of(
        "mistral", sliding_window=64, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    tokenizer = tiny.words_tokenizer("digits", chat_template="{{ messages }}")
    write_gguf(model, Vocabulary.of(tokenizer, ROWS), tmp_path / "model.gguf", "bf16", "mine")
    found = fields(tmp_path / "model.gguf")
    assert found["general.name"] == "mine"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    expected = {
        "context_length": 64,  # where a window of 64 changes nothing yet
        "embedding_length": 32, "block_count": 2, "feed_forward_length": 64, "vocab_size": ROWS,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
        "rope.dimension_count": 16, "rope.freq_base": 5e5,
    }  # fmt: skip
    assert {key: found[f"llama.{key}"] for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(model.config.rms_norm_eps)
    tokens = found["tokenizer.ggml.tokens"]
    assert {t: i for i, t in enumerate(tokens) if not t.startswith("[PAD")} == tokenizer.get_vocab()
    kinds = found["tokenizer.ggml.token_type"]
    assert [kinds[i] for i in (0, 1, 2, 3, ROWS - 1)] == [3, 3, 3, 1, 5]  # control, ordinary, without a token
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    said = {
        key: found[f"tokenizer.ggml.{key}"]
        for key in ("model", "pre", "bos_token_id", "eos_token_id", "padding_token_id")
    }
    assert said == {"model": "gpt2", "pre": "smollm", "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0}
    assert not found["tokenizer.ggml.add_bos_token"] and not found["tokenizer.ggml.add_eos_token"]
    assert found["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(("dtype", "within"), [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_numbers_are_as_near_as_their_type_allows(dtype, within, tmp_path):
    model = model_of("llama")
    write_gguf(model, Vocabulary.of(tiny.words_tokenizer(), ROWS), tmp_path / "model.gguf", dtype, "tiny")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    state = model.state_dict()
    for name, own in (
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        tensor = tensors[name]
        assert tensor.tensor_type.name.lower() == dtype
        numbers, exact = gguf.dequantize(tensor.data, tensor.tensor_type), state[own].numpy()
        blocks = np.abs(exact).reshape(len(exact), -1, 32 if dtype == "q8_0" else 1).max(-1, keepdims=True)
        error = np.abs(numbers - exact).reshape(len(exact), blocks.shape[1], -1)
        assert (error <= within * blocks).all() and (error.max() > 0) == (within > 0)
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


def test_what_f16_cannot_hold_is_refused(tmp_path):
    model = model_of("llama")
    model.lm_head.weight.data[3, 3] = 1e5
    vocabulary = Vocabulary.of(tiny.words_tokenizer(), ROWS)
    with pytest.raises(UserError, match=r"output\.weight .* --dtype bf16 or f32"):
        write_gguf(model, vocabulary, tmp_path / "model.gguf", "f16", "tiny")
    write_gguf(model, vocabulary, tmp_path / "again.gguf", "bf16", "tiny")


def test_a_scaled_rotation_is_written_as_factors(tmp_path):
    """Llama 3's scaling, by its definition: frequencies of long waves over the factor, of short ones as they are."""
    rotation = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = model_of("llama", rope_parameters=rotation, head_dim=16)
    write_gguf(model, Vocabulary.of(tiny.words_tokenizer(), ROWS), tmp_path / "model.gguf", "f16", "tiny")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    waves = 2 * np.pi * 1e4 ** (np.arange(0, 16, 2) / 16)
    smooth = (64 / waves - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / 8.0 + smooth)
    expected = np.where(waves > 64 / 1.0, 8.0, np.where(waves < 64 / 4.0, 1.0, between))
    np.testing.assert_allclose(tensors["rope_freqs.weight"].data, expected, rtol=1e-5)


# ------------------------------------------------------------------ tokenizers


def cut_by(*steps: Any) -> Any:
    tokenizer = tiny.words_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return tokenizer


@pytest.mark.parametrize("digits", [(), ("digits",)])
def test_transformers_reads_back_the_tokenizer(digits, tmp_path):
    """Where no digits stand: its reader takes every byte-level tokenizer for GPT-2's."""
    tokenizer = tiny.words_tokenizer(*digits)
    write_gguf(model_of("llama"), Vocabulary.of(tokenizer, ROWS), tmp_path / "model.gguf", "f16", "tiny")
    with quiet_transformers():
        again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        text = text if not digits else "".join(c for c in text if not c.isdigit())
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_a_cut_that_llama_cpp_does_not_have_is_refused():
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert Vocabulary.of(cut_by(pre_tokenizers.Digits(individual_digits=True), words), ROWS).rule == "smollm"
    for steps in (
        [pre_tokenizers.Digits(individual_digits=False), words],
        [words, pre_tokenizers.Digits(individual_digits=True)],
        [pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)],
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
        [pre_tokenizers.Whitespace()],
    ):
        with pytest.raises(UserError, match=r"no rule that splits texts as it does.*use --format merged"):
            Vocabulary.of(cut_by(*steps), ROWS)


def test_a_tokenizer_without_merges_needs_no_cut():
    """One token a byte: llama.cpp reads no file without a merge, so there is one of two tokens that no text becomes."""
    vocabulary = Vocabulary.of(tiny.tokenizer(), 300)
    assert (vocabulary.rule, vocabulary.adds_bos, vocabulary.adds_eos) == ("gpt-2", True, False)
    (merge,) = vocabulary.merges
    assert not set(merge.split()) & set(vocabulary.tokens)


# ------------------------------------------------------------------ `fedloom export --format gguf`


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_data):
    """A run of one round on a tiny Llama with a tokenizer of words."""
    place = tmp_path_factory.mktemp("gguf")
    recipe = {
        "name": "mine/tiny", "model": str(saved(place / "base", model_of("llama"))),
        "data": {"path": str(tiny_data), "max_length": 96, "template": "plain"},
        "split": {"splitter": "meta", "test": 0.2}, "adapter": {"rank": 2, "alpha": 4},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-2}, "federation": {"rounds": 1},
        "runtime": {"threads": 1, "device": "cpu"}, "evaluation": {"suite": None, "answers": 0},
    }  # fmt: skip
    run(Recipe.parse(recipe), place / "run")
    return place / "run"


def test_a_runs_file_is_its_merged_export(finished, tmp_path):
    merged = export_run(finished, "merged", tmp_path / "merged", None)
    whole = export_run(finished, "gguf", tmp_path / "whole", None, "f32")
    assert [p.name for p in whole.glob("*.gguf")] == ["mine%2Ftiny-F32.gguf"]
    assert_holds(next(whole.glob("*.gguf")), AutoModelForCausalLM.from_pretrained(merged), "llama")
    half = export_run(finished, "gguf", tmp_path / "half", None)
    assert next(half.glob("*.gguf")).name == "mine%2Ftiny-F16.gguf"
    with pytest.raises(UserError, match="exists already"):
        export_run(finished, "gguf", half, None)


def test_mistakes_are_told_before_anything_is_written(finished, tmp_path):
    for format, dtype, sentence in (
        ("gguf", "q4", "--dtype=q4 is not known.*q8_0"),
        ("merged", "f16", "--dtype=f16 works only with --format gguf"),
        ("ggfu", None, "did you mean gguf"),
    ):
        with pytest.raises(UserError, match=sentence):
            export_run(finished, format, tmp_path / "out", None, dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_are_refused(method, tmp_path):
    base = saved(tmp_path / "base", model_of("llama"))
    adapter = adapter_of(base, tmp_path / "adapter", method=method, virtual_tokens=2)
    with pytest.raises(UserError, match=r"cannot be merged.*use --format peft"):
        export_gguf(ModelConfig(name=str(base)), adapter, tmp_path / "model.gguf", "f16", "tiny")


def test_models_of_other_kinds_are_refused():
    with pytest.raises(UserError, match=r"type gemma .*only llama, mistral, qwen2, qwen3"):
        find_architecture(GemmaConfig())
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(UserError, match="rotation 'yarn'"):
        find_architecture(LlamaConfig(rope_parameters=yarn))
    with pytest.raises(UserError, match="rotation 'llama3' of this qwen2"):
        find_architecture(
            Qwen2Config(
                rope_parameters={**yarn, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            )
        )
    with pytest.raises(UserError, match="model uses gelu"):
        find_architecture(LlamaConfig(hidden_act="gelu"))


def test_a_full_disk_is_told_before_tensors_are_converted(finished, tmp_path, monkeypatch):
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr("fedloom.models.gguf.model._encode", None)
    with pytest.raises(OSError, match="No space left"):
        export_run(finished, "gguf", tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []


def test_the_room_that_is_taken_is_what_the_file_needs(tmp_path, monkeypatch):
    """Vectors of 24 bytes among the tensors, each of which begins at a multiple of 32."""
    asked: list[int] = []
    monkeypatch.setattr("os.posix_fallocate", lambda fd, offset, length: asked.append(length))
    vocabulary = Vocabulary.of(tiny.words_tokenizer(), ROWS)
    write_gguf(model_of("qwen3", head_dim=6), vocabulary, tmp_path / "model.gguf", "q8_0", "tiny")
    assert asked == [(tmp_path / "model.gguf").stat().st_size]
