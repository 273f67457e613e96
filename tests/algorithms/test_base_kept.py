"""`kept`: what an algorithm remembers is stored and comes back, older checkpoints are read, the rest is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

import fedloom
from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.common import registry
from fedloom.federation.hooks.base import Hook, HookOptions
from fedloom.federation.hooks.calls import Hooks
from fedloom.federation.record.checkpoints import ClientStore
from fedloom.federation.watch import Watch
from fedloom.messages.types import Payload, Update
from tests.helpers.averaging_rounds import drawn, saved, server, update


class Remembering(FedAvg):
    """The server adds momentum to the mean; a client adds what it did not send last time. Neither names a state."""

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        before = self.shared.flat.clone()
        super().aggregate(updates)
        momentum = self.kept.tensors.get("momentum", torch.zeros_like(before))
        self.kept.tensors["momentum"] = 0.5 * momentum + (self.shared.flat - before)
        self.kept.meta["rounds"] = self.kept.meta.get("rounds", 0) + 1
        self.shared.copy_(before + self.kept.tensors["momentum"])
        return {}

    def shared_state(self) -> Payload:
        flat = self.model.adapter.flat.cpu() + self.kept.tensors.get("rest", torch.tensor(0.0))
        sent = flat.half().float()
        self.kept = Payload({"rest": flat - sent}, {"turns": self.kept.meta.get("turns", 0) + 1})
        return Payload(self.model.adapter.layout.views(sent))


class Killed(BaseException):
    pass


def test_what_both_halves_keep_survives_a_kill(monkeypatch, tiny_recipe, tmp_path):
    monkeypatch.setitem(registry.algorithms._targets, "remembering", Remembering)
    recipe = tiny_recipe({"algorithm": "remembering", "federation.rounds": 3})
    whole = fedloom.run(recipe, out=tmp_path / "whole").summary

    def tick(what: str, round: int, done: int, total: int) -> None:
        if (what, round, done) == ("train", 3, 1):
            raise Killed

    with pytest.raises(Killed):
        fedloom.run(recipe, out=tmp_path / "killed", watch=Watch(tick=tick))
    resumed = fedloom.run(recipe, out=tmp_path / "killed", resume=True).summary
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    stores = [ClientStore(tmp_path / n / "clients").load("copy", 3)["personal"] for n in ("whole", "killed")]
    assert [s.meta for s in stores] == [{"turns": 3}] * 2
    assert torch.equal(stores[0].tensors["rest"], stores[1].tensors["rest"])
    assert stores[0].tensors["rest"].any()


#: What checkpoints of these algorithms held before they used `kept`: names beside `shared`, and metadata.
OLD = {
    "fedavgm": ({"m/a", "m/b"}, {}),
    "fedadam": ({"m/a", "m/b", "v/a", "v/b"}, {}),
    "diloco": ({"m/a", "m/b"}, {}),
    "fedbuff": (set(), {"version": 1}),
}


@pytest.mark.parametrize("name", OLD)
def test_checkpoints_of_older_runs_have_the_same_form(name):
    algorithm = server(name, drawn(0))
    algorithm.aggregate(iter([update("x", drawn(1))]))
    state = saved(algorithm)
    names, meta = OLD[name]
    assert state.tensors.keys() == {"shared/a", "shared/b"} | names
    assert state.meta == meta


def test_a_server_keeps_no_name_that_is_fedlooms_own():
    algorithm = server("fedavg", drawn(0))
    for name in ("shared/a", "hooks/ema/mean", "privacy/clip"):
        algorithm.kept = Payload({name: torch.ones(1)})
        with pytest.raises(
            ValueError, match=r"self\.kept of FedAvg has tensors\['.*fedloom's own: choose another name"
        ):
            algorithm.server_state()
    algorithm.kept = {"m": torch.ones(1)}
    with pytest.raises(ValueError, match="is a dict, but must be a plain Payload: write"):
        algorithm.server_state()
    with pytest.raises(ValueError, match="is a dict"):
        algorithm.client_state()


def test_a_hook_has_the_same_rules():
    class Listing(Hook):
        def fit_end(self, at: object) -> None: ...

    hook = Listing(HookOptions())
    hooks = Hooks({"listing": hook}, ("fit_end",))
    assert not hooks.state().tensors
    hook.kept.tensors["seen"] = [1, 2]
    with pytest.raises(ValueError, match=r"self\.kept of the hook listing has tensors\['seen'\], which is a list"):
        hooks.state()
