"""What every registered algorithm declares about itself, and the tables of it. Bytes are checked in tests/contracts."""

from __future__ import annotations

import inspect

import pytest
import torch

from fedloom.algorithms import about, catalogue
from fedloom.algorithms.about import About
from fedloom.algorithms.base import AlgorithmOptions
from fedloom.common import registry
from fedloom.messages import wire
from fedloom.messages.types import Payload, Update
from fedloom.models.attach import Models
from fedloom.recipe.recipe import AdapterConfig, ModelConfig

NAMES = registry.algorithms.names()

WHAT_TO_ADD = (
    "give the class its own `about: ClassVar = About(family, travels, paper, up=…, down=…, server=…, client=…)` from "
    "fedloom.algorithms.about; leave out what is the whole adapter (up, down, server) or nothing (client)"
)


def own(name: str) -> About:
    cls = registry.algorithms.get(name)
    assert "about" in vars(cls), f"{name}: {WHAT_TO_ADD}"
    return vars(cls)["about"]


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_says_its_family_paper_and_what_travels(name):
    said = own(name)
    assert said.paper or said.family == "baseline"
    if said.paper:
        module = inspect.getmodule(registry.algorithms.get(name))
        assert said.arxiv in (module.__doc__ or ""), "the file's docstring cites another paper"


def test_the_legend_says_how_large_an_adapter_is_and_what_names_add_to_it():
    sizes = about.reference(None)
    tensors = {n: torch.zeros(shape) for n, shape in sizes.layout.shapes.items()}
    message = wire.encode_outcome(Update("client-1", 2, Payload(tensors), 100, 1000, {"loss": 1.0}))
    text = " ".join(catalogue.LEGEND[0].split())
    assert f"An adapter is {catalogue.shown(sizes.adapter)} there" in text
    assert f"names add {100 * (len(message) / sizes.adapter - 1):.1f} % to a message with one" in text


def test_an_algorithm_of_others_that_says_nothing_of_itself_is_listed_all_the_same(monkeypatch):
    class Silent(registry.algorithms.get("fedavg")):
        """Says nothing."""

    class Asking(registry.algorithms.get("fedavg")):
        about = About("averaging", "adapter, both ways")

        class Options(AlgorithmOptions):
            needed: int

    monkeypatch.setitem(registry.algorithms._targets, "silent", Silent)
    monkeypatch.setitem(registry.algorithms._targets, "asking", Asking)
    lines = catalogue.table(catalogue.entries()[0])
    (silent,) = [line for line in lines if line.startswith("silent ")]
    (asking,) = [line for line in lines if line.startswith("asking ")]
    assert silent.split()[1:6] == ["?"] * 5  # not its parent's words
    assert "adapter, both ways" in asking
    assert "?" in asking
    assert lines.index(silent) > lines.index(catalogue.OTHERS)
    assert max(map(len, lines)) <= 100
    for name in ("silent", "asking"):
        page = catalogue.page(catalogue.entry(name))
        assert max(map(len, page)) <= 100
        assert any("plain sum" in line for line in page)
    assert any("needed (required)" in line for line in catalogue.page(catalogue.entry("asking")))


@pytest.mark.network
def test_the_federation_of_the_table_has_the_built_in_models_layers(smollm2):
    models = Models(ModelConfig(name="smollm2-135m"), AdapterConfig(), 0, "cpu")
    assert models.adapted().adapter.layout == about.reference(None).layout
