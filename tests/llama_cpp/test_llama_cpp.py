"""llama.cpp loads what `fedloom export --format gguf` writes, and computes what transformers computes of the merged export:
token ids, log-probabilities of the next token over the whole vocabulary, and greedy answers. `make test-gguf`.

Both compute in fp32, in another order: log-probabilities are within 2e-4 for tiny models and 2e-3 for the real one. Where
the first choice is twice that far from the second, at every step, the greedy answer has to be the same.
"""

from __future__ import annotations

import json
import re
import unicodedata
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom import run
from fedloom.models.gguf import model as gguf_model
from fedloom.recipe.recipe import Recipe
from fedloom.reporting.export import export_run
from tests.helpers import tiny
from tests.helpers.gguf_models import as_llama_3, model_of, saved

pytestmark = pytest.mark.gguf

TEXTS = [
    "copy: ant bee",
    "What is 12345 + 678? 3.14, 1,000,000 and 007",
    "  two  spaces\tand a tab \n\n and lines\r\n",
    "def f(x: int) -> str:\n    return f'{x:>3}' + \"\\n\"  # 1_000\n\n\nclass A(B): pass",
    "Grüße, 漢字かな, Привет, नमस्ते, مرحبا, e\u0301, ﬁ, ½",
    "🐍 ☃ 👩‍👩‍👧 \u200b zero width",
    "I'm, you'RE, they'll; 'twas \"quoted\" ... !!! ?!",
    "<s>owl</s> pig<pad>",
    "",
]
ANSWER = 24


class LlamaCpp:
    """A model in llama.cpp: its server, in this process, asked over the loopback interface."""

    def __init__(self, file: Path) -> None:
        import xllamacpp as xl

        wanted = xl.CommonParams()
        wanted.model.path = str(file)
        wanted.n_ctx, wanted.n_parallel, wanted.warmup, wanted.verbosity = 256, 1, False, 0
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
        wanted.cache_type_k = wanted.cache_type_v = xl.ggml_type.GGML_TYPE_F32
        wanted.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xl.Server(wanted)

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            said: dict[str, Any] = json.load(answer)
        return said

    def ids(self, text: str) -> list[int]:
        return list(self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"])

    def log_probabilities(self, ids: list[int], rows: int) -> torch.Tensor:
        """[rows] of the token after `ids`; one that is text is made to be chosen, since nothing is said of others."""
        text = self.ids("a")[-1]
        asked = {"n_predict": 1, "n_probs": rows, "logit_bias": [[text, 1000]], "cache_prompt": False}
        answer = self.ask("/completion", prompt=ids, **asked)
        (next_token,) = answer["completion_probabilities"]
        out = torch.full((rows,), -torch.inf)
        for token in next_token["top_logprobs"]:
            out[token["id"]] = token["logprob"]
        return out

    def answer(self, ids: list[int], tokens: int) -> list[int]:
        asked = {
            "n_predict": tokens,
            "temperature": 0,
            "return_tokens": True,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        return list(self.ask("/completion", prompt=ids, **asked)["tokens"])


@contextmanager
def exported(folder: Path, place: Path, dtype: str = "f32") -> Iterator[tuple[LlamaCpp, Any, Any]]:
    """(the run's file in llama.cpp, the merged export in transformers, its tokenizer)."""
    merged = export_run(folder, "merged", place / "merged", None)
    out = export_run(folder, "gguf", place / f"gguf-{dtype}", None, dtype)
    (file,) = out.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    yield LlamaCpp(file), model, AutoTokenizer.from_pretrained(merged)


def distance(there: LlamaCpp, model: Any, ids: list[int]) -> float:
    """The largest difference between the two log-probabilities of a next token, over the whole vocabulary."""
    with torch.no_grad():
        own = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
    return float((there.log_probabilities(ids, len(own)) - own).abs().max())


def greedy(model: Any, ids: list[int], tokens: int) -> tuple[list[int], float]:
    """(the answer, the smallest difference between the first and the second choice on the way)."""
    near, ids = torch.inf, list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].clone()
            if model.config.eos_token_id is not None:
                logits[model.config.eos_token_id] = -torch.inf  # as llama.cpp is told
            best = logits.topk(2)
            near = min(near, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
    return ids[start:], near


def assert_same(there: LlamaCpp, model: Any, tokenizer: Any, prompts: list[str], within: float) -> None:
    for text in TEXTS:
        if tokenizer.backend_tokenizer.normalizer is not None:  # Qwen2's: llama.cpp takes texts to be in NFC
            text = unicodedata.normalize("NFC", text)
        assert there.ids(text) == tokenizer(text)["input_ids"], text
    for text in prompts:
        ids = tokenizer(text)["input_ids"]
        assert distance(there, model, ids) < within
        expected, near = greedy(model, ids, ANSWER)
        assert near > 2 * within, f"{text!r} has two answers: choose another prompt"
        assert there.answer(ids, ANSWER) == expected


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    data = tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")

    def make(model: Path | str, **more: Any) -> Recipe:
        values: dict[str, Any] = {
            "name": "tiny", "model": str(model), "data": {"path": str(data), "max_length": 96, "template": "plain"},
            "split": {"splitter": "meta", "test": 0.2}, "adapter": {"rank": 4, "alpha": 8},
            "train": {"steps": 4, "batch_size": 2, "lr": 3e-2}, "federation": {"rounds": 1},
            "runtime": {"threads": 1, "device": "cpu"}, "evaluation": {"suite": None, "answers": 0},
        }  # fmt: skip
        return Recipe.parse(values, more)

    return make


KINDS: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "llama": ("llama", {}, tiny.words_tokenizer),
    "digits, tied, biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        lambda: tiny.words_tokenizer("digits"),
    ),
    "llama, one key head, narrow heads": ("llama", {"num_key_value_heads": 1, "head_dim": 4}, tiny.words_tokenizer),
    "llama 3's rotation": (
        "llama",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }},
        as_llama_3,
    ),
    "linear rotation": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, tiny.words_tokenizer),
    "mistral": ("mistral", {"sliding_window": 128}, tiny.words_tokenizer),
    "qwen2": ("qwen2", {}, tiny.words_tokenizer),  # which transformers gives Qwen2's own cut
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, tiny.words_tokenizer),
    "qwen3": ("qwen3", {"head_dim": 16}, tiny.words_tokenizer),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_trained_tiny_model_computes_the_same_in_llama_cpp(name, recipe, tmp_path):
    kind, more, tokenizer_of = KINDS[name]
    base = saved(tmp_path / "base", model_of(kind, **more), tokenizer_of())
    run(recipe(base), tmp_path / "run")
    with exported(tmp_path / "run", tmp_path) as (there, model, tokenizer):
        assert_same(there, model, tokenizer, ["copy: ant bee", "upper: owl pig 12", "def f(x):\n "], 2e-4)


def test_the_random_built_in_model_loads_too(recipe, tmp_path):
    """One token a byte, no merges, a bos in front of every text."""
    run(recipe("random-tiny"), tmp_path / "run")
    with exported(tmp_path / "run", tmp_path) as (there, model, tokenizer):
        assert there.ids("a") == tokenizer("a")["input_ids"]
        assert_same(there, model, tokenizer, ["copy: ant bee"], 2e-4)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_snippet_of_a_card_runs(template, recipe, tmp_path, monkeypatch, capsys):
    tokenizer = tiny.words_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    run(recipe(saved(tmp_path / "base", model_of("llama"), tokenizer), **{"data.template": template}), tmp_path / "run")
    out = export_run(tmp_path / "run", "gguf", tmp_path / "out", None)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n")  # what random weights say, which may be nothing


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_smaller_types_compute_nearly_the_same(dtype, recipe, tmp_path):
    run(recipe(saved(tmp_path / "base", model_of("llama"))), tmp_path / "run")
    with exported(tmp_path / "run", tmp_path, dtype) as (there, model, tokenizer):
        far = distance(there, model, tokenizer("copy: ant bee")["input_ids"])
    assert 1e-5 < far < {"f16": 0.02, "bf16": 0.15, "q8_0": 0.15}[dtype]


@pytest.mark.parametrize("broken", ["order of rows", "rotation", "cut"])
def test_these_tests_see_what_is_wrong(broken, recipe, tmp_path, monkeypatch):
    """What a converter gets wrong without any error: the oracle is no oracle if it does not see these."""
    base = saved(tmp_path / "base", model_of("llama"), tiny.words_tokenizer("digits"))
    run(recipe(base), tmp_path / "run")
    if broken == "order of rows":
        monkeypatch.setattr(gguf_model, "_reorder_rows", lambda tensor, heads: tensor.detach().float())
    elif broken == "rotation":
        monkeypatch.setattr(gguf_model.gguf.GGUFWriter, "add_rope_freq_base", lambda writer, value: None)
        monkeypatch.setattr(gguf_model, "_rotation_factors", lambda model: torch.full((4,), 1.05))
    else:
        monkeypatch.setattr("fedloom.models.gguf.vocabulary.SPLIT_RULES", {("digits", "words"): ("qwen2", False)})
    with exported(tmp_path / "run", tmp_path) as (there, model, tokenizer):
        if broken == "cut":
            assert any(there.ids(text) != tokenizer(text)["input_ids"] for text in TEXTS)
        else:
            assert distance(there, model, tokenizer("copy: ant bee owl")["input_ids"]) > 0.02


def test_a_run_of_the_real_model_answers_the_same_in_llama_cpp(smollm2, recipe, tmp_path):
    """SmolLM2-135M after four steps, in its chat template and without."""
    run(recipe("smollm2-135m", **{"train.lr": 1e-3, "data.template": "chat"}), tmp_path / "run")
    with exported(tmp_path / "run", tmp_path) as (there, model, tokenizer):
        asked = [{"role": "user", "content": "Name three animals and count to 12."}]
        chat = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        said = there.ask("/apply-template", messages=asked)["prompt"]
        assert said == chat
        prompts = [chat, "The capital of France is", "def fibonacci(n):\n    "]
        assert_same(there, model, tokenizer, prompts, 2e-3)
