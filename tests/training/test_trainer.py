"""Local training: optimisers and schedules in closed form, accumulation that accumulates, state that goes on exactly."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import fedloom
from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.common import registry
from fedloom.common.errors import ClientFailed
from fedloom.data.batching import Plan, collate, round_indices
from fedloom.data.tokenization import TokenSequence
from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import Payload
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig, TrainConfig
from fedloom.training.trainer import FitResult, fit, learning_rate
from tests.helpers import tiny


def adapted() -> AdaptedModel:
    base = tiny.causal_lm().requires_grad_(False)
    model = attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(rank=2, alpha=4), 0)
    draw = torch.Generator().manual_seed(1)
    model.adapter.flat.copy_(0.1 * torch.randn(model.adapter.layout.numel, generator=draw))
    return model


def fedavg():
    cls = registry.algorithms.get("fedavg")
    return cls(cls.Options(), 0, AdapterConfig())


SEQUENCES = [
    TokenSequence(np.random.default_rng(i).integers(3, 259, 6 + 5 * (i % 4)).astype(np.int32), 2 + i % 3)
    for i in range(16)
]


def batches(plan: Plan, round: int = 1, packed: bool = True) -> list:
    return [
        [collate([SEQUENCES[i] for i in indices], packed=packed, pad=3, examples=indices) for indices in passes]
        for passes in round_indices(range(16), plan, round, 0, "c")
    ]


def config(**values) -> TrainConfig:
    return TrainConfig(**{"steps": 4, "lr": 1e-2, "schedule": "constant", "clip": None, **values})


class Objective:
    """A learner with a loss of its own over the flat buffer; it notes what passes by."""

    def __init__(self, loss) -> None:
        self.loss = loss
        self.raw: list[torch.Tensor] = []
        self.clipped: list[torch.Tensor] = []
        self.path: list[torch.Tensor] = []

    def local_loss(self, model, batch, step_tokens):
        flat = torch.cat([p.flatten() for n, p in sorted(model.module.named_parameters()) if p.requires_grad])
        return self.loss(flat) * len(batch.labels) / step_tokens

    def before_step(self, model):
        self.raw.append(model.grad.clone())

    def after_step(self, model):
        self.clipped.append(model.grad.clone())
        self.path.append(model.adapter.flat.clone())


def follow(objective, values: TrainConfig, steps: int = 4, first: int = 0, total: int | None = None):
    """(start, path of the flat buffer in fp64, the learner)."""
    model = adapted()
    learner = Objective(objective)
    start = model.adapter.flat.double()
    fit(model, learner, batches(Plan(2, steps=steps)), values, first_step=first, total_steps=total or steps)
    return start, [x.double() for x in learner.path], learner


def quadratic(flat):
    return 0.5 * (flat - 0.3).square().sum()


# ------------------------------------------------------------------ optimisers


def test_sgd_with_momentum_and_decay_by_hand():
    values = config(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
    theta, path, _ = follow(quadratic, values)
    velocity = torch.zeros_like(theta)
    for step, seen in enumerate(path):
        gradient = theta - 0.3 + 0.01 * theta  # L2
        velocity = gradient if step == 0 else 0.9 * velocity + gradient
        theta = theta - 0.1 * velocity
        assert torch.allclose(seen, theta, atol=1e-6)


def test_adamw_by_hand():
    values = config(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    theta, path, _ = follow(quadratic, values)
    m = v = torch.zeros_like(theta)
    for step, seen in enumerate(path, 1):
        gradient = theta - 0.3
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient.square()
        theta = theta * (1 - 0.05 * 0.1)  # decoupled
        theta = theta - 0.05 * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-3)
        assert torch.allclose(seen, theta, atol=1e-6)


def test_the_gradient_is_clipped_as_torch_clips_it():
    for clip in (0.5, 1e6):
        _, _, learner = follow(quadratic, config(optimizer="sgd", lr=0.1, clip=clip))
        for raw, clipped in zip(learner.raw, learner.clipped, strict=True):
            parameter = torch.nn.Parameter(torch.zeros_like(raw))
            parameter.grad = raw.clone()
            torch.nn.utils.clip_grad_norm_([parameter], clip)
            assert torch.allclose(clipped, parameter.grad, rtol=1e-6, atol=0)
            assert float(clipped.norm()) <= clip * 1.0001
    assert float(learner.raw[0].norm()) > 1  # so that 0.5 was binding


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers_once_warm(schedule, warmup):
    total, warm = 20, int(20 * warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    reference = {
        "constant": lambda: get_constant_schedule(optimizer),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warm, total),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warm, total),
    }[schedule]()
    values = config(lr=3e-3, schedule=schedule, warmup=warmup)
    for step in range(total):
        rate = learning_rate(values, step, total)
        if step < warm:  # theirs wastes the first step on a rate of 0
            assert rate == pytest.approx(3e-3 * (step + 1) / warm)
        else:
            assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_schedules_end_near_nothing_and_never_below():
    for schedule in ("linear", "cosine"):
        rates = [learning_rate(config(schedule=schedule, warmup=0.1), s, 30) for s in range(40)]
        assert max(rates) == pytest.approx(1e-2)
        assert 0 < rates[29] < 0.05 * 1e-2
        assert rates[30:] == [0.0] * 10  # more steps than were announced move nothing


def test_a_round_goes_on_in_the_schedule_of_the_whole_run():
    """Under a constant gradient of 1, plain SGD moves by the sum of the rates of its own stretch."""
    values = config(optimizer="sgd", lr=0.1, schedule="linear", warmup=0.25)
    start, path, _ = follow(lambda flat: flat.sum(), values, steps=4, first=3, total=12)
    expected = [0.1 * (1 - k / 9) for k in range(4)]  # steps 3…6 of 12, of which the first 3 are warm-up
    assert torch.allclose(start - path[-1], torch.full_like(start, sum(expected)), atol=1e-6)


def test_warmup_begins_above_nothing():
    values = config(optimizer="sgd", lr=0.1, warmup=0.5)
    start, path, _ = follow(lambda flat: flat.sum(), values, steps=4)
    moved = [float((a - b).mean()) for a, b in zip([start, *path], path, strict=False)]
    assert moved == pytest.approx([0.05, 0.1, 0.1, 0.1], abs=1e-6)


# ------------------------------------------------------------------ accumulation


def trained(plan: Plan, packed: bool = True, **values) -> tuple[AdaptedModel, FitResult]:
    model = adapted()
    result = fit(
        model, fedavg(), batches(plan, packed=packed), config(**values), first_step=0, total_steps=plan.steps or 1
    )
    return model, result


@pytest.mark.parametrize("packed", [True, False])
def test_two_passes_of_four_are_one_pass_of_eight(packed):
    """Lengths differ, so a mean of means would be another loss."""
    whole, one = trained(Plan(8, 1, steps=2), packed, optimizer="sgd", lr=0.5)
    parts, two = trained(Plan(4, 2, steps=2), packed, optimizer="sgd", lr=0.5)
    moved = (whole.adapter.flat - adapted().adapter.flat).norm()
    assert float((whole.adapter.flat - parts.adapter.flat).norm()) <= 1e-5 * float(moved)
    assert float(moved) > 0.1
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert (one.steps, one.tokens) == (two.steps, two.tokens) == (2, sum(map(len, SEQUENCES)))


def test_a_steps_loss_is_the_mean_over_its_supervised_tokens():
    """From plain transformers: each sequence alone, its loss without any batching."""
    plan = Plan(4, 2, steps=1)
    _, result = trained(plan, lr=0.0)
    model, total, tokens = adapted(), 0.0, 0
    for batch in batches(plan)[0]:
        for i in batch.examples:
            ids = torch.tensor(SEQUENCES[i].ids.astype(np.int64))[None]
            labels = ids.clone()
            labels[0, : SEQUENCES[i].prompt] = -100
            count = len(SEQUENCES[i]) - SEQUENCES[i].prompt
            with torch.no_grad():
                total += float(model.module(input_ids=ids, labels=labels).loss) * count
            tokens += count
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)


def test_the_rounds_loss_weighs_steps_by_their_tokens():
    plan = Plan(1, steps=4)
    together = trained(plan, lr=0.0)[1]
    losses, counts = [], []
    for step in batches(plan):
        alone = fit(adapted(), fedavg(), [step], config(lr=0.0), first_step=0, total_steps=1)
        losses.append(alone.loss)
        counts.append(sum(len(b.labels) for b in step))
    assert together.loss == pytest.approx(np.average(losses, weights=counts), rel=1e-6)
    assert len(set(counts)) > 1


# ------------------------------------------------------------------ optimiser state


@pytest.mark.parametrize("values", [{}, {"optimizer": "sgd", "momentum": 0.9}], ids=["adamw", "sgd"])
def test_kept_state_goes_on_bit_for_bit_and_reset_does_not(values):
    steps = batches(Plan(2, steps=6))
    whole = adapted()
    end = fit(whole, fedavg(), steps, config(schedule="cosine", **values), first_step=0, total_steps=6)

    def in_two(keep: bool) -> tuple[AdaptedModel, FitResult]:
        model = adapted()
        first = fit(model, fedavg(), steps[:3], config(schedule="cosine", **values), first_step=0, total_steps=6)
        kept = from_bytes(to_bytes(Payload(first.optimizer_state))).tensors  # as it rests on disk
        later = fit(
            model,
            fedavg(),
            steps[3:],
            config(schedule="cosine", **values),
            first_step=3,
            total_steps=6,
            optimizer_state=kept if keep else None,
        )
        return model, later

    model, later = in_two(keep=True)
    assert model.adapter.sha256() == whole.adapter.sha256()
    assert later.optimizer_state.keys() == end.optimizer_state.keys()
    assert all(torch.equal(t, end.optimizer_state[n]) for n, t in later.optimizer_state.items())
    assert in_two(keep=False)[0].adapter.sha256() != whole.adapter.sha256()


def test_optimizer_state_is_a_copy():
    model = adapted()
    result = fit(model, fedavg(), batches(Plan(2, steps=2)), config(), first_step=0, total_steps=2)
    before = {n: t.clone() for n, t in result.optimizer_state.items()}
    fit(
        model,
        fedavg(),
        batches(Plan(2, steps=2)),
        config(),
        first_step=0,
        total_steps=2,
        optimizer_state=result.optimizer_state,
    )
    assert {"exp_avg", "exp_avg_sq", "step"} == set(before)
    assert all(torch.equal(t, result.optimizer_state[n]) for n, t in before.items())


def test_plain_sgd_keeps_nothing():
    result = fit(adapted(), fedavg(), batches(Plan(2, steps=1)), config(optimizer="sgd"), first_step=0, total_steps=1)
    assert result.optimizer_state == {}


# ------------------------------------------------------------------ numbers that are not finite


class Poisoned(Objective):
    """Plain training, except that at one step the loss or its gradient is not a number."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(quadratic)
        self.count, self.step, self.what = 0, step, what

    def local_loss(self, model, batch, step_tokens):
        self.count += 1
        loss = super().local_loss(model, batch, step_tokens)
        if self.count != self.step:
            return loss
        if self.what == "loss":
            return loss * torch.inf
        parameter = next(p for p in model.module.parameters() if p.requires_grad)
        return loss + (parameter * 0).sqrt().sum()  # finite, with an infinite gradient


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_fails_the_client_and_names_its_examples(what):
    model = adapted()
    steps = batches(Plan(2, steps=4))
    with pytest.raises(ClientFailed, match=f"the {what} of step 3 is not finite") as caught:
        fit(model, Poisoned(3, what), steps, config(optimizer="sgd"), first_step=0, total_steps=4)
    assert caught.value.reason == "non_finite"
    assert str(list(steps[2][0].examples)) in caught.value.detail
    assert not model.grad.any()
    assert not model.module.training


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("values", [{"optimizer": "sgd"}, {}], ids=["sgd", "adamw"])
def test_a_skipped_step_is_counted_and_leaves_no_trace(what, values):
    steps = batches(Plan(2, steps=4))
    model, clean = adapted(), adapted()
    result = fit(model, Poisoned(3, what), steps, config(nonfinite="skip", **values), first_step=0, total_steps=4)
    fit(clean, Objective(quadratic), [*steps[:2], steps[3]], config(**values), first_step=0, total_steps=4)
    assert (result.steps, result.skipped_steps) == (3, 1)
    assert model.adapter.sha256() == clean.adapter.sha256()
    assert math.isfinite(result.loss)


def test_a_round_of_skipped_steps_has_no_loss():
    model = adapted()
    before = model.adapter.sha256()
    result = fit(
        model,
        Poisoned(1, "loss"),
        batches(Plan(2, steps=1)),
        config(nonfinite="skip"),
        first_step=0,
        total_steps=1,
    )
    assert (result.steps, result.skipped_steps) == (0, 1)
    assert math.isnan(result.loss)
    assert model.adapter.sha256() == before


# ------------------------------------------------------------------ modes


def test_dropout_is_on_in_training_and_off_after_it():
    model = adapted()
    modes: list[bool] = []
    learner = Objective(quadratic)
    learner.loss = lambda flat: modes.append(model.module.training) or quadratic(flat)
    fit(model, learner, batches(Plan(2, steps=2)), config(), first_step=0, total_steps=2)
    assert modes == [True, True]
    assert not model.module.training
    assert not model.grad.any()


@pytest.mark.parametrize("nonfinite", ["skip", "fail"])
def test_a_run_counts_skipped_steps_and_reports_failed_clients(tiny_recipe, tmp_path, monkeypatch, nonfinite):
    """Through the whole package: the first step of one client gives infinity."""
    local_loss, spoiled = FedAvg.local_loss, []

    def poisoned(self, model, batch, step_tokens):
        loss = local_loss(self, model, batch, step_tokens)
        if self.client == "last" and not spoiled:
            spoiled.append(batch)
            return loss * torch.inf
        return loss

    monkeypatch.setattr(FedAvg, "local_loss", poisoned)
    result = fedloom.run(tiny_recipe({"train.nonfinite": nonfinite}), out=tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    failed = [e for e in events if e["event"] == "client_failed"]
    if nonfinite == "skip":
        assert (result.summary["skipped_steps"], result.summary["failures"], failed) == (1, 0, [])
        return
    assert (result.summary["skipped_steps"], result.summary["failures"]) == (0, 1)
    assert (failed[0]["client"], failed[0]["round"], failed[0]["reason"]) == ("last", 1, "non_finite")
    assert f"step 1 is not finite (examples {list(spoiled[0].examples)})" in failed[0]["detail"]
