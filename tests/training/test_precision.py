"""Mixed precision: what it may change and by how much, a scale that changes nothing, a choice by trying the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fedloom
import fedloom.federation.record.events
from fedloom.common import registry
from fedloom.common.errors import ClientFailed
from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig, TrainConfig
from fedloom.training import precision
from fedloom.training.trainer import Stepper, fit
from tests.helpers import tiny

DRAW = np.random.default_rng(0)
STEPS = [
    [collate([TokenSequence(DRAW.integers(3, 259, 20).astype(np.int32), 4)] * 2, packed=True, pad=3) for _ in range(2)]
    for _ in range(3)
]


def adapted(dtype: torch.dtype = torch.float32) -> AdaptedModel:
    base = tiny.causal_lm(spread=0.05).requires_grad_(False).to(dtype)
    return attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(rank=2, alpha=4), 0)


class Learner:
    """FedAvg's loss times `factor`, with the first gradient noted."""

    def __init__(self, factor: float = 1.0) -> None:
        cls = registry.algorithms.get("fedavg")
        self.own, self.factor, self.gradients, self.dtypes = cls(cls.Options(), 0, AdapterConfig()), factor, [], set()

    def local_loss(self, model, batch, step_units):
        hook = model.causal_lm.model.layers[0].mlp.register_forward_hook(lambda m, i, o: self.dtypes.add(o.dtype))
        loss = self.own.local_loss(model, batch, step_units) * self.factor
        hook.remove()
        return loss

    def before_step(self, model):
        self.gradients.append(model.grad.clone())

    def after_step(self, model):
        pass


def first_gradient(kind: str, factor: float = 1.0, dtype: torch.dtype = torch.float32):
    model, learner = adapted(dtype), Learner(factor)
    config = TrainConfig(steps=3, lr=1e-2, precision=kind, clip=None, schedule="constant")
    result = fit(model, learner, STEPS, config, first_step=0, total_steps=3)
    return learner.gradients[0], result, learner.dtypes


@pytest.mark.parametrize(("kind", "dtype", "close"), [("bf16", torch.bfloat16, 2e-2), ("fp16", torch.float16, 4e-3)])
def test_products_are_in_it_and_the_rest_is_not(kind, dtype, close):
    exact, plain, _ = first_gradient("fp32")
    near, result, dtypes = first_gradient(kind)
    assert dtypes == {dtype}
    assert near.dtype == torch.float32
    assert 1e-6 < float((near - exact).norm() / exact.norm()) < close  # rounding is there, and no more than it
    assert result.loss == pytest.approx(plain.loss, rel=close)
    assert {t.dtype for t in result.optimizer_state.values()} == {torch.float32}


def test_small_gradients_survive_fp16_by_the_scale(monkeypatch):
    small = 2.0**-22
    exact, _, _ = first_gradient("fp32", small)
    scaled, _, _ = first_gradient("fp16", small)
    monkeypatch.setattr(precision, "FIRST_SCALE", 1.0)
    lost, _, _ = first_gradient("fp16", small)
    assert float((scaled - exact).norm() / exact.norm()) < 2e-2
    assert float((lost - exact).norm() / exact.norm()) > 0.2


def test_an_fp16_base_is_trained_with_the_scale_though_its_products_are_not_autocast(monkeypatch):
    small = 2.0**-22
    exact, _, _ = first_gradient("fp32", small)
    scaled, _, dtypes = first_gradient("fp32", small, torch.float16)
    monkeypatch.setattr(precision, "FIRST_SCALE", 1.0)
    lost, _, _ = first_gradient("fp32", small, torch.float16)
    assert dtypes == {torch.float16}
    assert float((scaled - exact).norm() / exact.norm()) < 2e-2
    assert float((lost - exact).norm() / exact.norm()) > 0.2
    assert precision.LossScale("bf16", torch.float16).value == 1.0  # products with bf16 have exponents enough


def test_a_scale_that_overflows_is_halved_and_no_step_is_lost(monkeypatch):
    expected, plain, _ = first_gradient("fp16")
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**30)
    same, result, _ = first_gradient("fp16")
    assert (result.steps, result.skipped_steps) == (3, 0)
    assert result.tokens > plain.tokens  # computed again, and counted
    assert float((same - expected).norm() / expected.norm()) < 4e-3


def test_a_loss_that_is_not_finite_is_not_taken_for_an_overflow():
    with pytest.raises(ClientFailed, match="not finite"):
        first_gradient("fp16", math.inf)


class FirstSpoilt(Learner):
    """The first step's loss, or the gradient of it alone, is not finite; the passes of each step are counted."""

    def __init__(self, loss: float, gradient: float) -> None:
        super().__init__()
        self.spoilt, self.passes = (loss, gradient), [0]

    def local_loss(self, model, batch, step_units):
        self.passes[-1] += 1
        loss = super().local_loss(model, batch, step_units)
        if len(self.passes) > 1:
            return loss
        loss = loss * self.spoilt[0]
        loss.register_hook(lambda g: g * self.spoilt[1])
        return loss

    def before_step(self, model):
        super().before_step(model)
        self.passes.append(0)


@pytest.mark.parametrize(("loss", "gradient", "tries"), [(math.nan, 1.0, 1), (1.0, math.inf, 17)])
def test_what_no_scale_mends_is_skipped_and_later_steps_have_their_scale(loss, gradient, tries):
    learner = FirstSpoilt(loss, gradient)
    config = TrainConfig(steps=3, lr=1e-2, precision="fp16", clip=None, schedule="constant", nonfinite="skip")
    stepper = Stepper(adapted(), learner, config)
    stepper.model.module.train()
    for number, batches in enumerate(STEPS):
        stepper.step(number, batches, 1e-2)
    assert learner.passes[:3] == [2 * tries, 2, 2]
    assert (stepper.finished().steps, stepper.finished().skipped_steps) == (2, 1)
    assert stepper._scale.value == precision.FIRST_SCALE


def test_hooks_see_the_gradient_without_the_scale(tiny_recipe, tmp_path):
    more = {"hooks": ["gradient_noise"], "train.accumulation": 2, "federation.rounds": 1}
    noise = []
    for kind in ("fp32", "fp16"):
        fedloom.run(tiny_recipe({**more, "train.precision": kind}), out=tmp_path / kind)
        events = fedloom.federation.record.events.read_events(tmp_path / kind / "events.jsonl")
        noise += [e["metrics"]["gradient_noise/noise"] for e in events if e["event"] == "round_finished"]
    assert noise[1] == pytest.approx(noise[0], rel=0.05)


@pytest.mark.parametrize(("times", "chosen"), [(0.5, "bf16"), (0.95, "fp32"), (11.0, "fp32")])
def test_auto_goes_by_what_the_device_does_and_is_written_down(tiny_recipe, monkeypatch, times, chosen):
    monkeypatch.setattr(precision, "slowdown", lambda device, kind: times)
    assert prepare(tiny_recipe({"train.precision": "auto"}), Watch()).recipe.train.precision == chosen


def test_an_algorithm_that_reads_gradients_on_their_way_takes_no_scale(tiny_recipe):
    with pytest.raises(fedloom.UserError, match="slora sums gradients before"):
        prepare(tiny_recipe({"algorithm": "slora", "train.precision": "fp16"}), Watch())


def test_a_slow_precision_is_told_of(tiny_recipe, monkeypatch):
    monkeypatch.setattr(precision, "slowdown", lambda device, kind: 11.0)
    said: list[str] = []
    assert prepare(tiny_recipe({"train.precision": "bf16"}), Watch(say=said.append)).recipe.train.precision == "bf16"
    assert "train.precision=bf16 takes 11.0 times as long as fp32 on this machine: set train.precision=auto" in said
    monkeypatch.undo()
    assert 0.2 < precision.slowdown(torch.device("cpu"), "fp32") < 5  # the same twice, on a machine that others use too
