"""Model cards: what stands in them is what the run was, nothing of this machine is in them, and their snippets run."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom import run
from fedloom.common import pypi as carriers
from fedloom.common import registry
from fedloom.data.corpus import SITES
from fedloom.models.attach import attach
from fedloom.models.loading import BUILTIN, load_base
from fedloom.recipe.adapter import AdapterConfig
from fedloom.recipe.library import builtin_recipes
from fedloom.recipe.recipe import ModelConfig, Recipe
from fedloom.reporting.card import SECTIONS, card, settings
from fedloom.reporting.export import export_run
from tests.helpers import tiny


def front(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(head)
    return values


def snippet(text: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_data):
    """A run on a folder's model with data of the maker's own, private, and its folder."""
    place = tmp_path_factory.mktemp("card")
    model = tiny.save_model(place / "own-base", chat_template="{% for m in messages %}{{ m.content }}\n{% endfor %}")
    values = {
        "name": "mine", "model": str(model),
        "data": {"path": str(tiny_data), "max_length": 96, "template": "chat", "license": "CC0-1.0"},
        "split": {"splitter": "meta", "test": 0.2}, "adapter": {"rank": 2, "alpha": 4},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-2}, "federation": {"rounds": 2},
        "privacy": {"noise": 0.8, "seeded": True}, "runtime": {"threads": 1, "device": "cpu"},
        "evaluation": {"suite": None, "answers": 0},
    }  # fmt: skip
    return run(Recipe.parse(values), place / "run")


def test_a_runs_adapter_has_a_card_with_its_numbers(finished):
    text = (finished.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    summary = finished.summary
    assert front(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["fedloom", "federated-learning", "fedavg", "lora"],
    }
    assert "`own-base` (a model of the maker's own)" in text and "Licence: CC0-1.0" in text
    for pair in (summary["loss"], summary["loss"]["worst_client"]):
        assert f"{pair['before']:.3f} | {pair['after']:.3f}" in text
    assert f"{summary['cost']['train_tokens']:,} tokens, {summary['cost']['steps']:,} optimiser steps" in text
    spent = summary["privacy"]
    assert f"ε = {spent['epsilon']:.3g} at δ = {spent['delta']:.3g}" in text
    assert "follows from the recipe's seed" in text
    assert "45 examples to train on, 12 held out, of 3 clients" in text


def test_nothing_of_this_machine_and_no_client_stands_in_a_card(finished, tmp_path):
    pages = [finished.folder / "adapter" / "README.md"]
    for form in ("peft", "merged"):
        pages.append(export_run(finished.folder, form, tmp_path / form, None) / "README.md")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "/tmp" not in text and str(Path.home()) not in text and str(finished.folder.parent) not in text
        for client in finished.summary["per_client"]:
            assert not re.search(rf"\b{client}\b", text), client


def test_the_snippets_of_exports_run(finished, tmp_path, monkeypatch):
    """As they stand, in the export's folder, with the base model's folder beside what the adapter's names."""
    said = {}
    for form in ("peft", "merged"):
        out = export_run(finished.folder, form, tmp_path / form, None)
        if form == "peft":
            (out / "own-base").symlink_to(finished.folder.parent / "own-base")
        monkeypatch.chdir(out)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet((out / "README.md").read_text(encoding="utf-8")), {})
        said[form] = printed.getvalue()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([tokenizer("Name three animals.\n", add_special_tokens=False)["input_ids"]])
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generate(ids, max_new_tokens=64, do_sample=False)
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert said == {"peft": expected, "merged": expected} and len(expected) > 20


def test_a_personal_result_has_its_own_clients_numbers(tiny_recipe, tmp_path):
    done = run(tiny_recipe(algorithm="local"), tmp_path / "run")
    for client, numbers in done.summary["per_client"].items():
        text = (done.folder / "adapters" / client / "README.md").read_text(encoding="utf-8")
        assert f"# tiny, {client}'s own" in text
        loss = numbers["loss"]
        assert f"| loss, on this client's data | {loss['before']:.3f} | {loss['after']:.3f} |" in text
        others = set(done.summary["per_client"]) - {client}
        assert not any(re.search(rf"\b{other}\b", text) for other in others)
        assert "No differential privacy" in text and 'prompt = "Name three animals.\\n"' in text


def test_a_result_with_a_base_delta_is_not_said_to_be_an_adapter_alone(tiny_recipe, tmp_path):
    done = run(tiny_recipe(algorithm="flora"), tmp_path / "run")
    assert (done.folder / "adapter" / "base_delta.safetensors").is_file()
    text = (done.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "peft alone would load another model" in text and "```python" not in text


def test_what_peft_writes_for_a_card_does_not_stay(tiny_model, tmp_path):
    """Where no run writes one over it, as at a site."""
    model = attach(load_base(ModelConfig(name=str(tiny_model))), AdapterConfig(rank=2), 0)
    model.save(tmp_path / "adapter", "base")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_built_in_model_and_a_corpus_are_named_as_a_hub_knows_them(tmp_path):
    recipe = Recipe.parse({"name": "r", "model": "smollm2-135m", "data": {"corpus": "fed-dolly", "template": "chat"}})
    (tmp_path / "adapter_config.json").touch()
    text = card(tmp_path, recipe, None)
    assert front(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en"],
        "datasets": ["databricks/databricks-dolly-15k"],
        "tags": ["fedloom", "federated-learning", "fedavg", "lora"],
    }
    assert (
        "Licence: CC-BY-SA-3.0" in text and "rounded to 4 bits" in text and "no summary when this was written" in text
    )


def test_the_data_of_sites_are_not_said_to_be_the_recipes_corpus(finished, tmp_path):
    summary = {**finished.summary, "corpus_source": SITES, "corpus_license": "the sites'"}
    text = card(tmp_path, Recipe.parse({"data": {"corpus": "fed-dolly", "template": "plain"}}), summary)
    assert "The sites' own" in text and "fedavg, between sites" in text and "datasets" not in front(text)
    assert "databricks" not in text and "CC-BY-SA" not in text


def test_what_is_not_known_is_said_to_be_unknown(tmp_path):
    recipe = Recipe.parse({"model": "owner/model", "data": {"path": "owner/rows", "template": "plain"}})
    text = card(tmp_path, recipe, None)
    assert front(text)["base_model"] == "owner/model" and front(text)["datasets"] == ["owner/rows"]
    assert "license" not in front(text) and "language" not in front(text)
    assert "Of the base model: unknown to fedloom" in text and "Of the data: unknown" in text


@pytest.mark.parametrize("path", builtin_recipes().values(), ids=lambda p: p.stem)
def test_the_settings_in_a_card_are_the_recipe(path):
    recipe = Recipe.load(path)
    again = Recipe.parse(yaml.safe_load(settings(recipe)))
    assert {k: again.resolved()[k] for k in SECTIONS} == {k: recipe.resolved()[k] for k in SECTIONS}


def test_every_corpus_and_every_carrier_says_its_licence_and_source():
    for name in registry.corpora.names():
        source = registry.corpora.get(name)
        assert source.license and source.homepage.startswith("https://"), name
    for carrier, _ in BUILTIN.values():
        assert carriers.named(carrier).license and carriers.named(carrier).upstream
