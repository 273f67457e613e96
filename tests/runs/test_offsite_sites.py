"""Offsite tuning between sites: nobody but the server has the model, and what it keeps back never reaches a site."""

from __future__ import annotations

import pytest

from fedloom.experiment.run import run
from fedloom.messages import wire
from fedloom.models.loading import load_base
from tests.helpers.sites import between_sites

pytest.importorskip("nvflare")
pytestmark = pytest.mark.usefixtures("no_waiting", "no_reports")

RECIPE = {"adapter.method": "full", "federation.rounds": 2, "train.lr": 1e-3}


@pytest.mark.parametrize("algorithm", ["fedot", "fedbiot"])
def test_sites_without_the_model_make_the_simulators_plug_in(tiny_recipe, dealt, tmp_path, monkeypatch, algorithm):
    """The sites' processes cannot load a model; no name and no byte of a dropped layer is in what they are sent."""
    recipe = tiny_recipe({"algorithm": algorithm, **RECIPE})
    simulated = run(recipe, tmp_path / "simulated").summary
    base = load_base(recipe.model).model
    received: list[bytes] = []

    def alter(client: str, asked: bytes, message: bytes) -> bytes:
        received.append(asked)
        return message

    def nowhere(*_: object) -> None:
        raise AssertionError("a site looks for the model")

    monkeypatch.setattr("fedloom.runtimes.sites.trainer.load_tokenizer", nowhere)
    loads: list[str] = []
    monkeypatch.setattr("fedloom.models.attach.load_base", lambda config, *a: loads.append("") or load_base(config, *a))
    found = between_sites(recipe, dealt(recipe), tmp_path / "sites", alter).summary
    assert len(loads) == 1, "the server's"
    assert found["adapter_sha256"] == simulated["adapter_sha256"]
    assert found["offsite"]["emulator_tuned"] == simulated["offsite"]["emulator_tuned"]
    assert found["loss"] == {"before": None, "after": None, "worst_client": found["loss"]["worst_client"]}
    assert "the data are at sites" in found["offsite"]["note"]

    kept = set(wire.decode_assignment(received[0]).payload.meta["cut"]["kept"])
    dropped = {n: p for n, p in base.named_parameters() if _layer(n) in set(range(1, 4)) - kept}
    assert dropped
    sent = b"".join(received)
    for name, weight in dropped.items():
        assert name.encode() not in sent
        if weight.numel() > 64:  # not a norm's ones
            assert weight.detach().numpy().tobytes()[:256] not in sent
    emulated = next(p for n, p in base.named_parameters() if "self_attn.q_proj" in n and _layer(n) == 0)
    assert emulated.detach().numpy().tobytes()[:256] in sent, "what travels is found by the same search"


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else None


def test_what_is_sent_before_the_first_round_is_the_recipe_and_the_tokenizer(tiny_recipe, dealt, tmp_path, monkeypatch):
    from fedloom.runtimes.sites.trainer import Room

    orders: list[dict[str, object]] = []
    prepare = Room._prepare
    monkeypatch.setattr(Room, "_prepare", lambda self, given: orders.append(given) or prepare(self, given))
    for algorithm, files in (("fedot", True), ("fedavg", False)):
        recipe = tiny_recipe({"algorithm": algorithm, "evaluation.every": 0, "federation.rounds": 1})
        between_sites(recipe, dealt(recipe), tmp_path / algorithm)
        assert bool(orders[-1]["files"]) == files
        assert all(name.startswith("tokenizer/") for name in orders[-1]["files"])
        assert set(orders[-1]) == {"recipe", "run", "sites", "files"}
