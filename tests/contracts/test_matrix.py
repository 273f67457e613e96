"""Every PEFT method with every registered algorithm: a pair runs two rounds, or is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedloom
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.experiment.prepare import prepare
from fedloom.federation.client import Client
from fedloom.federation.record.checkpoints import ClientStore
from fedloom.federation.watch import Watch
from fedloom.messages.types import Assignment, Update
from fedloom.recipe.adapter import METHODS
from fedloom.recipe.recipe import Recipe

pytestmark = pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")

NAMES = registry.algorithms.names()

#: A whole prompt or prefix lies in no layer, and these two keep the last layers to each client.
WITHOUT_LAYERS = {(m, a) for m in ("prompt_tuning", "p_tuning", "prefix_tuning") for a in ("fedper", "fedrep")}

#: As small as runs are: two clients, one step a round (two, where a round trains two parts in turn), and no clipping: two
#: zeroth-order steps that were both clipped may cancel to the last bit.
VALUES = {
    "split.splitter": "uniform",
    "split.num_clients": 2,
    "train.clip": None,
    "train.batch_size": 1,
    "train.packing": "on",
}
OPTIONS = {"ferret": {"bases": 64}}


def takes(method: str, algorithm: str) -> bool:
    methods = registry.algorithms.get(algorithm).properties.methods
    return (methods is None or method in methods) and (method, algorithm) not in WITHOUT_LAYERS


PAIRS = [(method, name) for method in METHODS for name in NAMES]
TAKEN = [p for p in PAIRS if takes(*p)]
REFUSED = [p for p in PAIRS if not takes(*p)]


def recipe_of(tiny_recipe: Callable[..., Recipe], method: str, name: str) -> Recipe:
    adapter = {"method": method, **({"rank": 2} if method in {"lora", "adalora"} else {})}
    if "virtual_tokens" in METHODS[method].keys:
        adapter["virtual_tokens"] = 4
    values = {
        **VALUES,
        "adapter": adapter,
        "algorithm": {"name": name, **OPTIONS.get(name, {})},
        "train.steps": 2 if name == "fedrep" else 1,
    }
    return tiny_recipe(values)


@pytest.mark.parametrize(("method", "name"), TAKEN)
def test_a_pair_runs_two_rounds(method, name, tiny_recipe, tmp_path):
    setting = prepare(recipe_of(tiny_recipe, method, name), Watch())
    server = setting.algorithm
    client = Client(setting.models, setting.data, setting.template, ClientStore(tmp_path / "c"), tmp_path / "a")
    recipe, clients = setting.recipe.resolved(), setting.data.partition.training_clients
    first = server.deployed().adapter.flat.clone()
    results = []
    for number in (1, 2):
        updates = []
        for one in clients:
            payload = server.initial_payload(one) if number == 1 else server.round_payload(one)
            steps = setting.recipe.train.steps
            outcome = client.handle(Assignment("train", one, number, 2, payload, steps=steps, recipe=recipe))
            assert isinstance(outcome, Update), outcome
            server.accept(outcome)
            held = {
                n: t.clone() for n, t in outcome.payload.tensors.items()
            }  # the live buffer goes on to the next client
            updates.append(Update(one, number, type(payload)(held, outcome.payload.meta), outcome.num_examples, 1))
        server.aggregate(iter(updates))
        server.server_step()
        deployed = server.deployed()
        results.append(torch.cat([deployed.adapter.flat, *(t.flatten() for t in (deployed.base_delta or {}).values())]))
    assert all(bool(torch.isfinite(r).all()) for r in results)
    if not server.properties.personal:
        moved = [results[0][: len(first)] - first, results[1][: len(first)] - results[0][: len(first)]]
        assert all(bool(m.any()) for m in moved) or deployed.base_delta


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_a_pair_is_refused_before_anything_is_loaded(method, name, tiny_recipe, tmp_path, monkeypatch):
    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("fedloom.data.loading.load_corpus", loaded)
    monkeypatch.setattr("fedloom.models.attach.load_base", loaded)
    with pytest.raises(UserError, match=rf"adapter\.method={method}\b.*: ") as refused:
        fedloom.run(recipe_of(tiny_recipe, method, name), out=tmp_path / "run")
    assert str(refused.value).count(": ") == 1  # what is wrong, then how to fix it
    assert list(Path(tmp_path).iterdir()) == []


def test_the_matrix_has_both_kinds_for_every_method():
    for method in METHODS:
        assert [name for m, name in TAKEN if m == method]
    assert {m for m, _ in REFUSED} == set(METHODS) - {"lora"}
    assert len(PAIRS) == len(METHODS) * len(NAMES)


#: (what the recipe asks for, the sentence): settings that no run of the algorithm could end well with.
IMPOSSIBLE = [
    ({"algorithm": "fedrep", "train.steps": 1}, "fedrep trains two parts in turn, but train.steps=1"),
    ({"algorithm": "slora", "model.dtype": "bfloat16"}, "but model.dtype=bfloat16: set model.dtype=float32"),
    ({"algorithm": "fedit", "adapter.ranks": {"copy": 1}}, "needs one rank for all clients"),
    ({"algorithm": "flora", "adapter.dora": True}, "does not take adapter.dora=true"),
    ({"algorithm": "feddpa", "adapter.bias": "all"}, "does not take adapter.bias=all"),
]


@pytest.mark.parametrize(
    ("values", "sentence"), IMPOSSIBLE, ids=lambda v: v.get("algorithm") if isinstance(v, dict) else ""
)
def test_settings_that_cannot_end_well_are_refused_before_anything_is_loaded(
    values, sentence, tiny_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr("fedloom.data.loading.load_corpus", lambda *a, **k: pytest.fail("something was loaded"))
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")):
        fedloom.run(tiny_recipe(values), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rank_for_a_client_that_there_is_not_is_refused_before_the_model_is_loaded(
    tiny_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr("fedloom.models.attach.load_base", lambda *a, **k: pytest.fail("the model was loaded"))
    recipe = tiny_recipe({"algorithm": "flexlora", "adapter.ranks": {"coppy": 1}})
    with pytest.raises(UserError, match=r"adapter\.ranks names coppy, which is no client: did you mean copy\?"):
        fedloom.run(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
