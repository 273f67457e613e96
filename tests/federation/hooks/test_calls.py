"""Hooks: their points in order, what they may change, where their state rests, and who refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.experiment.prepare import prepare
from fedloom.federation.hooks.base import CLIENT_POINTS, SERVER_POINTS, Hook, HookOptions
from fedloom.federation.hooks.calls import for_clients
from fedloom.federation.record.checkpoints import Checkpoints, ClientStore
from fedloom.federation.record.events import read_events
from fedloom.federation.watch import Watch
from fedloom.messages.types import Payload
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.sites.policy import Policy, Refused

CALLS: list[tuple[str, str, int]] = []


class Noting(Hook):
    """Notes every point that passes by."""


for _point in (*CLIENT_POINTS, *SERVER_POINTS):

    def _note(self, at, point=_point):
        CALLS.append((self.client, point, self.round))

    setattr(Noting, _point, _note)


class Counting(Hook):
    """Both halves count, with a random number in their state that only survives if the state does."""

    class Options(HookOptions):
        start: int = 0

    def _count(self) -> None:
        seen = self.kept.tensors.get("seen", torch.tensor([0.1], dtype=torch.float64))
        self.kept = Payload({"seen": seen * 1.1 + 1}, {"times": self.kept.meta.get("times", self.options.start) + 1})
        self.numbers = {"times": self.kept.meta["times"], "seen": float(self.kept.tensors["seen"])}

    def after_step(self, at) -> None:
        self._count()

    def aggregated(self, at) -> None:
        self._count()


class Pulling(Hook):
    """A loss of its own: pulls the adapter to zero."""

    def after_forward(self, at) -> None:
        weights = [p for p in at.step.model.module.parameters() if p.requires_grad]
        share = at.batch.units / sum(b.units for b in at.step.batches)
        at.loss = at.loss + share * 0.5 * sum(p.square().sum() for p in weights)


class Standing(Hook):
    """No step goes anywhere."""

    def before_step(self, at) -> None:
        at.grad.zero_()


@pytest.fixture(autouse=True)
def _own_hooks(monkeypatch):
    for name, cls in {"noting": Noting, "counting": Counting, "pulling": Pulling, "standing": Standing}.items():
        monkeypatch.setitem(registry.hooks._targets, name, cls)
    CALLS.clear()


def run(recipe: Recipe, out: Path, **more: Any) -> dict[str, Any]:
    return fedloom.run(recipe, out=out, **more).summary


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(folder / "events.jsonl") if e["event"] == kind]


# ------------------------------------------------------------------ points


def test_points_come_in_their_order(tiny_recipe, tmp_path):
    one = {"split.splitter": "uniform", "split.num_clients": 1, "train.accumulation": 2, "federation.rounds": 1}
    run(tiny_recipe({**one, "hooks": ["noting"]}), tmp_path / "run")
    passes = ["batch_start", "after_forward", "after_backward"] * 2
    step = [*passes, "before_step", "after_step"]
    client = ["fit_start", "epoch_start", *step, *step, "epoch_end", "fit_end"]
    assert [p for _, p, _ in CALLS] == ["round_start", *client, "aggregated", "round_end"]
    assert {(c, r) for c, p, r in CALLS if p in CLIENT_POINTS} == {("client-1", 1)}
    assert {(c, r) for c, p, r in CALLS if p in SERVER_POINTS} == {("", 1)}


def test_an_epoch_is_a_pass_over_the_data(tiny_recipe, tmp_path):
    more = {"train.steps": None, "train.epochs": 2, "train.batch_size": 8, "federation.rounds": 1}
    run(tiny_recipe({**more, "hooks": "noting"}), tmp_path / "run")
    for client, steps in {"copy": 1, "last": 2, "upper": 3}.items():  # 8, 15 and 22 examples
        own = [p for c, p, _ in CALLS if c == client and p in {"epoch_start", "after_step", "epoch_end"}]
        assert own == ["epoch_start", *["after_step"] * steps, "epoch_end"] * 2


def test_an_algorithm_without_gradients_has_the_outer_points(tiny_recipe, tmp_path):
    run(tiny_recipe({"algorithm": "fedmezo", "federation.rounds": 1, "hooks": ["noting"]}), tmp_path / "run")
    assert {p for c, p, _ in CALLS if c == "copy"} == {"fit_start", "fit_end"}


def test_watching_changes_no_bit_and_nothing_is_called_without_hooks(tiny_recipe, tmp_path, monkeypatch):
    plain = run(tiny_recipe(), tmp_path / "plain")
    watched = run(tiny_recipe({"hooks": ["noting", "counting"]}), tmp_path / "watched")
    assert watched["adapter_sha256"] == plain["adapter_sha256"]
    assert watched["loss"] == plain["loss"]

    def never(*args):
        raise AssertionError("a point was reached without hooks")

    monkeypatch.setattr("fedloom.federation.hooks.calls.FitHooks.__init__", never)
    monkeypatch.setattr("fedloom.federation.hooks.calls.Hooks.numbers", lambda self: {} if not self else never())
    assert run(tiny_recipe(), tmp_path / "again")["adapter_sha256"] == plain["adapter_sha256"]


def test_a_hooks_loss_is_what_is_trained_on(tiny_recipe, tmp_path):
    """A pull of a half ‖w‖² adds w to the gradient, which is SGD's weight decay of 1."""
    sgd = {"train.optimizer": "sgd", "train.lr": 0.05, "train.clip": None, "train.accumulation": 2}
    start = prepare(tiny_recipe(), Watch()).model.initial.norm()
    pulled = fedloom.run(tiny_recipe({**sgd, "hooks": ["pulling"]}), out=tmp_path / "pulled")
    decayed = fedloom.run(tiny_recipe({**sgd, "train.weight_decay": 1.0}), out=tmp_path / "decayed")
    vectors = [
        torch.cat([p.detach().flatten() for n, p in r.model.named_parameters() if "lora_" in n])
        for r in (pulled, decayed)
    ]
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-6)
    assert float(vectors[0].norm()) < 0.9 * float(start)


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fed_sb", {"name": "slora", "sparse_rounds": 2}], ids=str)
def test_a_changed_gradient_is_what_is_stepped_by_whatever_trains(tiny_recipe, tmp_path, algorithm):
    more = {"algorithm": algorithm, "federation.rounds": 1, "train.optimizer": "sgd", "train.weight_decay": 0.0}
    for hooks in ([], ["standing"]):
        loss = fedloom.run(tiny_recipe({**more, "hooks": hooks}), out=tmp_path / str(len(hooks))).summary["loss"]
        assert (loss["after"] == loss["before"]) == bool(hooks)


def test_numbers_of_clients_and_server_are_logged(tiny_recipe, tmp_path):
    run(tiny_recipe({"hooks": [{"name": "counting", "start": 3}]}), tmp_path / "run")
    told = {
        (e["round"], e["client"]): e["metrics"]["counting/times"] for e in events(tmp_path / "run", "client_update")
    }
    assert told == {(r, c): 3 + 2 * r for r in (1, 2) for c in ("copy", "last", "upper")}  # two steps a round
    assert [e["metrics"]["counting/times"] for e in events(tmp_path / "run", "round_finished")] == [
        4,
        5,
    ]  # the server's


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_state_survives_a_kill_bit_for_bit(tiny_recipe, tmp_path, monkeypatch, killed_in):
    hooks = [
        "counting",
        {"name": "ema", "decay": 0.7},
        {"name": "gradient_noise"},
        {"name": "early_stopping", "patience": 9},
    ]
    recipe = tiny_recipe({"hooks": hooks, "federation.rounds": 3, "train.accumulation": 2, "adapter.dropout": 0.1})
    whole = run(recipe, tmp_path / "whole")

    save = Checkpoints.save

    def dying(self, state):
        if state.round == killed_in:
            raise KeyboardInterrupt
        return save(self, state)

    monkeypatch.setattr(Checkpoints, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run")
    monkeypatch.setattr(Checkpoints, "save", save)
    again = run(recipe, tmp_path / "run", resume=True)
    assert again["adapter_sha256"] == whole["adapter_sha256"]
    assert again["loss"] == whole["loss"]
    for kind in ("client_update", "round_finished"):
        pairs = zip(events(tmp_path / "run", kind), events(tmp_path / "whole", kind), strict=True)
        assert all(a["metrics"] == b["metrics"] for a, b in pairs)
    states = [Checkpoints(tmp_path / n / "checkpoints").newest()[0] for n in ("run", "whole")]
    assert states[0].notes["hooks"] == states[1].notes["hooks"]
    mine = [{n: t for n, t in s.server.tensors.items() if n.startswith("hooks/")} for s in states]
    assert mine[0].keys() == mine[1].keys() == {"hooks/counting/seen", "hooks/ema/mean"}
    assert all(torch.equal(t, mine[1][n]) for n, t in mine[0].items())
    kept = [ClientStore(tmp_path / n / "clients").load("upper", 3)["hooks"] for n in ("run", "whole")]
    assert kept[0].meta == kept[1].meta
    assert set(kept[0].meta) == {"counting", "gradient_noise"}


# ------------------------------------------------------------------ recipes and refusals


def test_hooks_are_added_replaced_and_removed(tiny_recipe):
    recipe = tiny_recipe({"hooks": "ema"})
    assert [h.name for h in recipe.hooks] == ["ema"]
    both = recipe.with_hook("early_stopping", patience=2)
    assert [h.name for h in both.hooks] == ["ema", "early_stopping"]
    replaced = both.with_hook("ema", decay=0.5)
    assert [(h.name, h.options) for h in replaced.hooks] == [
        ("ema", {"decay": 0.5}),
        ("early_stopping", {"patience": 2}),
    ]
    assert replaced.without_hook("early_stopping").without_hook("ema").resolved() == tiny_recipe().resolved()
    assert Recipe.parse(replaced.resolved()) == replaced
    with pytest.raises(UserError, match="no hook 'emo' to leave out: did you mean ema"):
        replaced.without_hook("emo")


@pytest.mark.parametrize(
    ("hooks", "more", "words"),
    [
        (["emma"], {}, "unknown hook 'emma': did you mean ema"),
        ([{"name": "ema", "deca": 0.5}], {}, "unknown option deca of the hook ema: did you mean decay"),
        ([{"name": "ema", "decay": 1.0}], {}, "decay=1.0 is not valid for the hook ema"),
        (["ema", "ema"], {}, "hooks has ema twice"),
        (["ema"], {"algorithm": "flora"}, "algorithm flora is something else"),
        (["ema"], {"algorithm": "fed_sb"}, "algorithm fed_sb is something else"),
        (["ema"], {"algorithm": "fedkseed"}, "algorithm fedkseed is something else"),
        (["ema"], {"algorithm": "ditto"}, "algorithm ditto is something else"),
        (["early_stopping"], {"split.validation": 0.0}, "split.validation=0 gives no client any"),
        (["gradient_noise"], {}, "set train.accumulation=2"),
        (
            ["early_stopping"],
            {"privacy": {"clip": 1.0, "noise": 1.0}},
            "hook early_stopping makes numbers that privacy does not cover",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tiny_recipe, tmp_path, hooks, more, words):
    with pytest.raises(UserError, match=words):
        fedloom.run(tiny_recipe({**more, "hooks": hooks}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_site_sees_client_hooks_alone_and_its_policy_decides(tiny_recipe):
    recipe = tiny_recipe({"hooks": ["ema", "gradient_noise", "early_stopping"], "train.accumulation": 2})
    sent = for_clients(recipe)
    assert sent["hooks"] == [{"name": "gradient_noise"}]
    assert {**sent, "hooks": None} == {**recipe.resolved(), "hooks": None}
    Policy().check(sent)
    Policy(hooks=["gradient_noise"]).check(sent)
    for allowed in ([], ["ema"]):
        with pytest.raises(Refused, match="does not allow gradient_noise"):
            Policy(hooks=allowed).check(sent)
    Policy(hooks=[]).check(for_clients(recipe.without_hook("gradient_noise")))


def test_a_number_that_is_not_finite_is_the_hooks_fault(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Counting, "after_step", lambda self, at: self.numbers.update(bad=float("nan")))
    with pytest.raises(ValueError, match="number counting/bad is nan"):
        fedloom.run(tiny_recipe({"hooks": ["counting"]}), out=tmp_path / "run")


def test_summary_and_events_without_hooks_are_as_they_were(tiny_recipe, tmp_path):
    summary = run(tiny_recipe(), tmp_path / "run")
    assert summary["stopped"] is None
    assert all(e["metrics"] == {} for e in events(tmp_path / "run", "client_update"))
    assert (
        json.loads((tmp_path / "run" / "checkpoints" / "round-0002" / "state.json").read_text())["notes"].get("hooks")
        is None
    )
