"""DPO under the algorithms: whatever they do to adapter or base, the reference stays the base as it was loaded."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms import base
from fedloom.data.batching import collate
from fedloom.models.attach import attach
from fedloom.models.forward import token_losses
from fedloom.models.loading import load_base
from fedloom.recipe.recipe import AdapterConfig, ModelConfig
from fedloom.training.objectives import log_probabilities, unit_losses
from tests.helpers import preferences
from tests.helpers.federation import Federation

pytestmark = pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")

DPO_RUN = {
    "train.objective": "dpo", "adapter.dropout": 0.1, "split.splitter": "uniform", "split.num_clients": 2,
    "train.batch_size": 2, "train.accumulation": 2,
}  # fmt: skip
#: Plain; those that change the base; those with a loss or a model beside; those that walk over the steps themselves.
NAMES = (
    "fedavg", "fedex_lora", "flora", "slora", "scaffold", "pfedme", "feddpa", "fed_sb", "fedkseed", "decomfl", "global",
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return preferences.write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture
def recipe(tiny_recipe, pairs):
    return lambda **more: tiny_recipe({**DPO_RUN, "data.path": str(pairs), **more})


@pytest.fixture(scope="module")
def untouched(tiny_model):
    """A base of its own, with an adapter that adds nothing."""
    return attach(load_base(ModelConfig(name=str(tiny_model))), AdapterConfig(rank=1), 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_base_in_every_round(recipe, tmp_path, untouched, monkeypatch, name):
    seen = []

    def watched(model, batch):
        seen.append(batch)
        return unit_losses(model, batch)

    monkeypatch.setattr(base, "unit_losses", watched)
    federation = Federation(recipe(**{"algorithm.name": name}), tmp_path)
    data = federation.setting.data
    measured = {c: federation.evaluate(c, 0).metrics for c in federation.setting.found.clients.testing_clients}
    for metrics in measured.values():
        assert metrics["margin_sum"] == 0.0 and metrics["preferred"] == metrics["pairs"] / 2
    updates = federation.round(1)
    first = len(seen)
    federation.client._objective._known.clear()  # so that the second round's are of that round's model
    federation.client._objective._held_out.clear()
    federation.round(2)
    assert first < len(seen)
    for batch in (*seen[:2], *seen[first : first + 2], seen[-1]):
        for number, i in enumerate(batch.examples):
            alone = collate(data.sequences.pair(i), packed=True, pad=0)
            with torch.no_grad():
                known = log_probabilities(alone, token_losses(untouched, alone))
            assert torch.equal(batch.reference[2 * number : 2 * number + 2], known)
    assert all(u.num_examples == len(data.client(u.client).train) for u in updates)  # pairs, not answers
    assert federation.evaluate(next(iter(measured)), 2).metrics["margin_sum"] != 0.0


def test_a_penalty_on_the_weights_counts_once_a_step(recipe, tmp_path):
    """fedprox away from what it was sent, over two forward passes of unequal numbers of tokens."""
    federation = Federation(recipe(**{"algorithm.name": "fedprox", "algorithm.mu": 2.0}), tmp_path)
    federation.evaluate(federation.clients[0], 0)
    client, model, data = federation.client, federation.model, federation.setting.data
    prox, objective = client._algorithm, client._objective
    model.adapter.flat.add_(0.01)
    objective.prepare(model, data.sequences, [0, 1, 2, 3], True)
    batches = [objective.batch(data.sequences, part, packed=True, pad=0) for part in ([0], [1, 2, 3])]
    plain = sum(unit_losses(model, batch).sum() for batch in batches) / 4
    whole = sum(prox.local_loss(model, batch, 4) for batch in batches)
    assert float((whole - plain).detach()) == pytest.approx(model.adapter.layout.numel * 0.01**2, rel=1e-3)
