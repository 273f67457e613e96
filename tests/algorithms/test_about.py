"""What every registered algorithm says of itself is so: bytes in each message, bytes that each side keeps, words that fit.

Two rounds are played by hand through real messages, and the tensors in them and in the kept states are counted.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterator

import pytest
import torch

from fedloom.algorithms import about, catalogue
from fedloom.algorithms.about import About, Sizes
from fedloom.algorithms.base import AlgorithmOptions
from fedloom.common import registry
from fedloom.messages import wire
from fedloom.messages.types import Payload, Update
from fedloom.models.attach import Models
from fedloom.recipe.recipe import AdapterConfig, ModelConfig
from tests.helpers.federation import Federation

NAMES = registry.algorithms.names()

WHAT_TO_ADD = (
    "give the class its own `about: ClassVar = About(family, travels, paper, up=…, down=…, server=…, client=…)` from "
    "fedloom.algorithms.about; leave out what is the whole adapter (up, down, server) or nothing (client)"
)

#: Less work where the default is for large models.
OPTIONS = {"ferret": {"bases": 64}}

#: Counters that a state may have besides its numbers: bytes for each client.
COUNTERS = 32


def own(name: str) -> About:
    cls = registry.algorithms.get(name)
    assert "about" in vars(cls), f"{name}: {WHAT_TO_ADD}"
    return vars(cls)["about"]


def size(payload: Payload) -> int:
    return sum(t.numel() * t.element_size() for t in payload.tensors.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_says_its_family_paper_and_what_travels(name):
    said = own(name)
    assert said.family in about.FAMILIES
    assert 0 < len(said.travels) <= 26
    assert said.paper or said.family == "baseline"
    if said.paper:
        assert re.fullmatch(r"\S+ et al\. (19|20)\d\d, arXiv \d{4}\.\d{5}", said.paper)
        module = inspect.getmodule(registry.algorithms.get(name))
        assert said.arxiv in (module.__doc__ or ""), "the file's docstring cites another paper"


def layout_of(model: str):
    """Of an adapter on every layer, which is not what an algorithm that cuts the model trains."""
    return Models(ModelConfig(name=model), AdapterConfig(rank=2, alpha=4), 42, "cpu").adapted().adapter.layout


@pytest.mark.parametrize("name", NAMES)
def test_messages_states_and_memory_are_what_an_algorithm_says(name, tiny_recipe, tmp_path):
    said, properties = own(name), registry.algorithms.get(name).properties
    federation = Federation(tiny_recipe({"algorithm": {"name": name, **OPTIONS.get(name, {})}}), tmp_path)
    clients, server = federation.clients, federation.server
    layout = layout_of(federation.recipe.model.name)
    for number in (1, 2):
        sizes = Sizes(layout, 2, len(clients), number, federation.recipe.train.steps, server.options)
        read: list[list[weakref.ref[torch.Tensor]]] = []

        def updates(number=number, sizes=sizes, read=read) -> Iterator[Update]:
            for client in clients:
                update = federation.train(client, number)
                message = federation.messages.pop()
                ways = [(message.up, said.up(sizes)), (message.down, said.down(sizes))]
                if properties.offsite and number == 1:
                    ways.pop()  # the model itself, which the summary's left_server counts
                for payload, declared in ways:
                    found = size(payload)
                    assert found <= declared if said.at_most else found == declared, f"round {number}"
                    assert found >= declared // 2
                del message, payload
                # The loop that reads this still holds the update before it, and where the rule streams no other.
                held = [refs for refs in read[:-1] if any(r() is not None for r in refs)]
                assert not (held and properties.streams), "an update is held on to after it was folded"
                read.append([weakref.ref(t) for t in update.payload.tensors.values()])
                yield update
                del update

        server.aggregate(updates())
        server.server_step()
        assert len(read) == len(clients)
        kept = [federation.store.load(c, number).get("personal", Payload()) for c in clients]
        assert all(size(k) == said.client(sizes) for k in kept)
        state = size(server.server_state())
        assert 0 <= state - said.server(sizes) <= COUNTERS * len(clients)


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
