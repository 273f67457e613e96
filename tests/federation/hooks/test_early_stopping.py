"""Early stopping, the moving average and the gradient noise scale, each against what its equations say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fedloom
from fedloom.common import registry
from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.evaluation.loss import loss_sums
from fedloom.experiment.prepare import prepare
from fedloom.federation.hooks.base import ServerRound
from fedloom.federation.hooks.calls import Hooks, parse_hook
from fedloom.federation.hooks.gradient_noise import two_terms
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.events import read_events
from fedloom.federation.watch import Watch
from fedloom.messages.at_rest import load_tensors
from fedloom.models.attach import attach
from fedloom.models.layout import Adapter, Layout
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig, HookConfig, TrainConfig
from fedloom.training.trainer import fit
from tests.helpers import tiny

# ------------------------------------------------------------------ early stopping


def stopped_at(losses: list[float | None], **options) -> tuple[int, str]:
    """The round after which the hook stops, 0 for never, and its sentence."""
    hook = parse_hook(HookConfig(name="early_stopping", **options))
    for number, loss in enumerate(losses, 1):
        at = ServerRound(number, len(losses), algorithm=None, validation=loss)
        hook.round_end(at)
        if at.stop:
            return number, at.stop
    return 0, ""


def test_patience_counts_measurements_since_the_best():
    assert stopped_at([3, 2, 2.5, 1.9, 2, 2, 2], patience=3)[0] == 7
    assert stopped_at([3, 2, 2, 2, 1], patience=2)[0] == 4  # equal is no improvement
    assert stopped_at([3, 2, 1, 0.5], patience=1)[0] == 0
    assert stopped_at([3, 2.95, 2.91, 2.8], patience=2, min_delta=0.1)[0] == 3
    assert stopped_at([3, None, None, 4], patience=1)[0] == 4  # nobody could measure: nothing is known
    assert stopped_at([1, 9, 2, 9, 2, 9], patience=2, every=2)[0] == 6  # 9, 9, 9: only rounds 2, 4, 6 count
    _, sentence = stopped_at([1.0, 2.0], patience=1)
    assert sentence == "the validation loss 2.0000 is the 1. in a row that is not below 1.0000, that of round 1"


DIVERGING = {"train.lr": 0.3, "train.schedule": "constant", "federation.rounds": 6, "split.validation": 0.2}


@pytest.fixture(scope="module")
def stopping() -> dict:
    return {"hooks": [{"name": "early_stopping", "patience": 1}], **DIVERGING}


def test_a_run_that_is_stopped_ends_as_any_run_ends(tiny_recipe, tmp_path, stopping):
    seen: list[str] = []
    result = fedloom.run(
        tiny_recipe(stopping), out=tmp_path / "run", watch=Watch(event=lambda e: seen.append(e["event"]))
    )
    summary, told = result.summary, read_events(tmp_path / "run" / "events.jsonl")
    rounds = summary["rounds"]
    assert 1 < rounds < 6
    (stop,) = [e for e in told if e["event"] == "run_stopped"]
    assert summary["stopped"] == {k: stop[k] for k in ("round", "hook", "reason")}
    assert (stop["round"], stop["hook"]) == (rounds, "early_stopping")
    assert seen[-1] == "run_finished"
    assert [e["round"] for e in told if e["event"] == "evaluation"] == list(range(rounds + 1))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"was stopped after round {rounds}" in page
    assert stop["reason"] in page

    # The loss that it went by is that of everybody's validation data under what was deployed then.
    setting = prepare(tiny_recipe(stopping), Watch())
    for number in (rounds - 1, rounds):
        state = Checkpoints(tmp_path / "run" / "checkpoints").load(number)
        setting.model.adapter.load({n.removeprefix("shared/"): t for n, t in state.server.tensors.items()})
        sums = [
            loss_sums(setting.model, d.sequences, d.validation, batch_size=24, packed=True)
            for d in map(setting.data.client, setting.found.clients.clients)
        ]
        (event,) = [e for e in told if e["event"] == "round_finished" and e["round"] == number]
        own = event["metrics"]["early_stopping/validation_loss"]
        assert own == pytest.approx(sum(s for s, _ in sums) / sum(n for _, n in sums), rel=1e-6)
    assert summary["cost"]["evaluation_upload_bytes"] > 0

    # Resumed, it stays stopped; the same federation of so many rounds has the same adapter.
    (tmp_path / "run" / "summary.json").unlink()
    again = fedloom.run(tiny_recipe(stopping), out=tmp_path / "run", resume=True).summary
    assert (again["adapter_sha256"], again["stopped"], again["rounds"]) == (
        summary["adapter_sha256"], summary["stopped"], rounds,
    )  # fmt: skip
    short = {**stopping, "hooks": [], "federation.rounds": rounds}
    assert (
        fedloom.run(tiny_recipe(short), out=tmp_path / "short").summary["adapter_sha256"] == summary["adapter_sha256"]
    )


def test_personal_models_are_saved_and_measured_when_a_run_is_stopped(tiny_recipe, tmp_path, stopping):
    summary = fedloom.run(tiny_recipe({"algorithm": "local", **stopping}), out=tmp_path / "run").summary
    last = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "evaluation"][-1]
    assert summary["rounds"] < 6
    assert (last["round"], last["pooled"]) == (summary["rounds"], True)
    assert sorted(p.name for p in (tmp_path / "run" / "adapters").iterdir()) == ["copy", "last", "upper"]


# ------------------------------------------------------------------ the moving average


class OneAdapter:
    """A server half of which the hook reads the adapter alone."""

    def __init__(self, numel: int) -> None:
        self.shared = Adapter(Layout({"w": (numel,)}))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_the_weighted_mean_of_the_rounds(decay):
    hook, server = parse_hook(HookConfig(name="ema", decay=decay)), OneAdapter(7)
    draw = torch.Generator().manual_seed(0)
    rounds = [torch.randn(7, generator=draw) for _ in range(5)]
    for t, now in enumerate(rounds, 1):
        server.shared.flat.copy_(now)
        hook.aggregated(ServerRound(t, 5, algorithm=server))
        weights = torch.tensor([decay ** (t - i) for i in range(1, t + 1)], dtype=torch.float64)
        expected = (weights[:, None] * torch.stack(rounds[:t]).double()).sum(0) / weights.sum()
        torch.testing.assert_close(hook.deploys(server), expected, rtol=1e-12, atol=1e-12)
        assert hook.numbers["distance"] == pytest.approx(float((expected - now.double()).norm()), abs=1e-12)
    assert parse_hook(HookConfig(name="ema", deploy=False)).deploys(server) is None


def test_the_average_is_what_is_measured_and_saved_and_not_what_is_trained(tiny_recipe, tmp_path):
    more = {"train.schedule": "constant", "train.lr": 0.05}
    hooks = {"hooks": [{"name": "ema", "decay": 0.5}]}
    plain = fedloom.run(tiny_recipe(more), out=tmp_path / "plain")
    averaged = fedloom.run(tiny_recipe({**more, **hooks}), out=tmp_path / "ema")
    first, second = [dict(Checkpoints(tmp_path / "plain" / "checkpoints").load(r).server.tensors) for r in (1, 2)]
    own = Checkpoints(tmp_path / "ema" / "checkpoints").load(2).server.tensors
    assert all(torch.equal(own[n], t) for n, t in second.items())  # training went on from the adapter itself
    saved = load_tensors(tmp_path / "ema" / "adapter" / "adapter_model.safetensors")
    assert saved
    for name, tensor in saved.items():
        mean = (0.25 * first[f"shared/{name}"].double() + 0.5 * second[f"shared/{name}"].double()) / 0.75
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)
    assert averaged.summary["adapter_sha256"] != plain.summary["adapter_sha256"]

    setting = prepare(tiny_recipe(more), Watch())
    setting.model.adapter.load(saved)
    sums = [
        loss_sums(setting.model, d.sequences, d.test, batch_size=24, packed=True)
        for d in map(setting.data.client, setting.found.clients.clients)
    ]
    loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
    assert averaged.summary["loss"]["after"] == pytest.approx(loss, rel=1e-6)
    assert abs(loss - plain.summary["loss"]["after"]) > 1e-4


def test_where_the_average_may_stand_in_clients_measure_what_is_deployed(tiny_recipe):
    """For every algorithm that the hook takes: what is sent under `deploying` gives the model that `deployed` gives."""
    taken = []
    for name in registry.algorithms.names():
        cls = registry.algorithms.get(name)
        if cls.properties.offsite:
            continue
        setting = prepare(tiny_recipe({"algorithm": name}), Watch())
        server, hook = setting.algorithm, parse_hook(HookConfig(name="ema"))
        try:
            hook.check(setting.recipe, server, setting.found.clients)
        except fedloom.UserError:
            continue
        taken.append(name)
        moved = server.shared.snapshot()
        for tensor in set(server.round_payload("copy").tensors) & set(moved.views):  # what a round may change
            moved.views[tensor].add_(0.5)
        hook.kept.tensors = {"mean": moved.flat.double() * 0.2}
        hook.kept.meta = {"rounds": 1}
        hooks = Hooks({"ema": hook}, ("aggregated",))
        before = server.shared.flat.clone()
        client = cls(server.options, server.seed, server.adapter)
        client.client_model(setting.models, server.round_payload("copy"))
        client.evaluating = True
        client.begin("copy", 1, None)
        with hooks.deploying(server):
            deployed = server.deployed().adapter.flat.clone()
            client.receive(server.round_payload("copy"))
        assert torch.equal(server.shared.flat, before), name
        torch.testing.assert_close(deployed, moved.flat, rtol=0, atol=1e-6)
        assert not torch.equal(deployed, before)
        torch.testing.assert_close(client.model.adapter.flat, deployed, rtol=0, atol=1e-6, msg=name)
    assert {"fedavg", "fedprox", "fedadam", "scaffold", "ffa_lora", "flexlora", "median", "fedbuff"} <= set(taken)
    assert not {"flora", "fedex_lora", "fed_sb", "fedkseed", "decomfl", "ditto", "local"} & set(taken)


# ------------------------------------------------------------------ gradient noise


def test_the_two_terms_are_those_of_equations_a2_and_a3():
    """In closed form: |G|² = 2, tr Σ = 12; expected squared norms at 4 and at 16 examples."""
    small, big = 2 + 12 / 4, 2 + 12 / 16
    assert two_terms([(small, 4)] * 4, (big, 16)) == pytest.approx((2, 12))
    mixed = [(2 + 12 / b, b) for b in (2, 4, 6)]
    assert two_terms(mixed, (2 + 12 / 12, 12)) == pytest.approx((2, 12))


def test_the_scale_is_the_true_one_of_a_known_distribution():
    """Example i pulls the weights to its own x_i: its gradient is w − x_i, so G = w − E x and Σ is the x's covariance."""
    model = attach(
        Base(tiny.causal_lm().requires_grad_(False), tiny.tokenizer(), ""), AdapterConfig(rank=2, alpha=4), 0
    )
    numel, draw = model.adapter.layout.numel, torch.Generator().manual_seed(3)
    sigma, away = 0.7, 0.4
    start = model.adapter.flat.clone()
    points = start + away + sigma * torch.randn(400, numel, generator=draw)

    class Pulled:
        def local_loss(self, model, batch, step_units):
            weights = [p for _, p in sorted(model.adapter_parameters.items())]
            flat = torch.cat([p.flatten() for p in weights])
            mine = torch.stack([self.row(i) for i in batch.examples])
            return 0.5 * (flat - mine).square().sum(1).mean() * batch.units / step_units

        def row(self, i):
            return torch.cat([model.adapter.layout.views(points[i])[n].flatten() for n in names])

        def before_step(self, model):
            model.grad.add_(7.0)  # an algorithm's correction is no part of the data's noise

        def after_step(self, model):
            model.adapter.flat.copy_(start)  # so that every step asks the same question

    live = {n.replace(".default", ""): p for n, p in model.module.named_parameters() if p.requires_grad}
    names = sorted(live)
    model.adapter_parameters = live
    sequence = TokenSequence(np.arange(3, 9).astype(np.int32), 2)
    steps = [
        [collate([sequence] * 2, packed=True, pad=3, examples=[8 * s + 2 * i, 8 * s + 2 * i + 1]) for i in range(4)]
        for s in range(50)
    ]
    hook = parse_hook(HookConfig(name="gradient_noise", decay=0.98))
    hooks = Hooks({"gradient_noise": hook}, ("batch_start", "after_backward", "before_step"))
    fit(
        model,
        Pulled(),
        steps,
        TrainConfig(steps=50, lr=1e-3),
        first_step=0,
        total_steps=50,
        hooks=hooks.fit(model, model.grad),
    )
    hook.fit_end(None)
    assert hook.numbers["noise"] == pytest.approx(sigma**2 * numel, rel=0.03)
    assert hook.numbers["signal"] == pytest.approx(away**2 * numel, rel=0.03)
    assert hook.numbers["scale"] == pytest.approx((sigma / away) ** 2, rel=0.05)


def test_the_scale_is_in_the_updates_and_in_the_report(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"hooks": ["gradient_noise"], "train.accumulation": 2, "train.steps": 4})
    fedloom.run(recipe, out=tmp_path / "run")
    told = read_events(tmp_path / "run" / "events.jsonl")
    updates = [e for e in told if e["event"] == "client_update"]
    assert len(updates) == 6
    assert all(e["metrics"]["gradient_noise/noise"] > 0 for e in updates)
    finished = next(e for e in told if e["event"] == "round_finished")
    own = [(u["metrics"]["gradient_noise/noise"], u["examples"]) for u in updates if u["round"] == 1]
    mean = sum(v * n for v, n in own) / sum(n for _, n in own)
    assert finished["metrics"]["gradient_noise/noise"] == pytest.approx(mean)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "gradient_noise/noise" in page
