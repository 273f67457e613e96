"""Several clients in one pass: each gets its own gradient, whatever becomes of the others."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedloom.common.errors import ClientFailed
from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.attach import attach
from fedloom.models.forward import token_losses
from fedloom.models.loading import Base
from fedloom.models.quantised import quantise_model
from fedloom.models.reference import reference
from fedloom.recipe.recipe import AdapterConfig, TrainConfig
from fedloom.training.cohort import Cohort
from fedloom.training.cohort_probe import refusal, speedups
from fedloom.training.lockstep import Runner, Stopped
from fedloom.training.trainer import fit
from tests.helpers import tiny


class Plain:
    """A client's learner; `spoils`: the number of the step whose loss is not finite."""

    def __init__(self, spoils: int | None = None) -> None:
        self.spoils, self.calls = spoils, 0

    def local_loss(self, model, batch, step_units):
        self.calls += 1
        loss = token_losses(model, batch).sum() / step_units
        return loss * float("nan") if self.calls == self.spoils else loss

    def before_step(self, model): ...

    def after_step(self, model): ...


def made(causal_lm=None, **adapter):
    base = Base(causal_lm or tiny.causal_lm(), tiny.tokenizer(), "made here")
    return attach(base, AdapterConfig(rank=2, alpha=4, **adapter), seed=0)


def gpt2():
    """Its layers, Conv1D, give views of what they compute, with a bias in it."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=tiny.VOCABULARY, **sizes, **dropout)).eval().requires_grad_(False)


def int8():
    """Its layers' products come from an autograd function of our own."""
    causal_lm = tiny.causal_lm()
    quantise_model(causal_lm, "int8")
    return causal_lm


def batch(*lengths: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    sequences = [TokenSequence(rng.integers(3, tiny.VOCABULARY, n).astype(np.int32), 1) for n in lengths]
    return collate(sequences, packed=True, pad=0, examples=range(len(lengths)))


def start(model, number: int):
    """A different adapter for each client."""
    draw = torch.Generator().manual_seed(number)
    model.adapter.copy_(model.initial + 0.05 * torch.randn(model.initial.shape, generator=draw))


def train(model, number, steps, learner=None, **config):
    start(model, number)
    values = {"steps": 1, "lr": 1e-2, "eps": 1e-4, "clip": 0.5 + number, **config}
    walk = [[batch(*lengths, seed=number * 10 + i) for lengths in step] for i, step in enumerate(steps)]
    result = fit(
        model, learner or Plain(), walk, TrainConfig.model_validate(values), first_step=2 * number, total_steps=9
    )
    return result, model.adapter.flat.clone()


def together(model, works):
    cohort = Cohort(model, len(works))
    return cohort.run([partial(train, seat, *work) for seat, work in zip(cohort.seats, works, strict=True)])


@pytest.mark.parametrize("base", [tiny.causal_lm, gpt2, int8])
@pytest.mark.parametrize("lengths", [(8, 8, 8), (8, 5, 11)], ids=["equal", "unequal"])
def test_each_seat_gets_the_loss_and_the_gradient_that_its_client_gets_alone(lengths, base):
    model, found = made(base()), []
    batches = [batch(n, seed=n + i) for i, n in enumerate(lengths)]
    for number, own in enumerate(batches):
        start(model, number)
        model.grad.zero_()
        loss = token_losses(model, own).mean()
        model.backward(loss)
        found.append((float(loss.detach()), model.grad.clone()))

    cohort = Cohort(model, 3)

    def one(number):
        seat = cohort.seats[number]
        start(seat, number)
        loss = token_losses(seat, batches[number]).mean()
        seat.backward(loss)
        return float(loss.detach())

    losses = cohort.run([partial(one, number) for number in range(3)])
    for seat, loss, (expected, gradient) in zip(cohort.seats, losses, found, strict=True):
        assert loss == pytest.approx(expected, abs=1e-5)
        assert float((seat.grad - gradient).norm()) <= 1e-5 * float(gradient.norm())
        assert float(gradient.norm()) > 0


def test_steps_lengths_accumulation_clipping_and_schedules_are_each_clients_own():
    model = made()
    works = [
        (0, [[(9,)], [(7, 5)], [(6,)]]),
        (1, [[(9,), (4, 3)]]),  # one step of two passes, and done
        (2, [[(5,)], [(9,), (8,)], [(4,)], [(12,)]]),
    ]
    alone = [train(model, *work) for work in works]
    for (one, flat), (other, flat_too) in zip(alone, together(model, works), strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert (other.steps, other.tokens, other.flops) == (one.steps, one.tokens, one.flops)
        assert float((flat - flat_too).norm()) <= 1e-5 * float((flat - model.initial).norm())
        for name, state in one.optimizer_state.items():
            assert float((state - other.optimizer_state[name]).norm()) <= 1e-5 * float(state.norm()), name


@pytest.mark.parametrize("nonfinite", ["fail", "skip"])
def test_a_client_that_is_not_finite_disturbs_nobody(nonfinite):
    model, steps = made(), [[(9,)], [(7,)], [(6,)]]
    alone = [train(model, number, steps) for number in (0, 2)]
    cohort = Cohort(model, 3)

    def spoiled(seat):
        try:
            return train(seat, 1, steps, Plain(spoils=2), nonfinite=nonfinite)
        except ClientFailed as failure:
            return failure

    first, broken, last = cohort.run(
        [partial(train, cohort.seats[0], 0, steps), partial(spoiled, cohort.seats[1]), partial(train, cohort.seats[2], 2, steps)]
    )  # fmt: skip
    for (one, flat), (other, flat_too) in zip(alone, (first, last), strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert float((flat - flat_too).norm()) <= 1e-5 * float((flat - model.initial).norm())
    if nonfinite == "fail":
        assert isinstance(broken, ClientFailed)
        assert "step 2" in broken.detail
    else:
        assert (broken[0].steps, broken[0].skipped_steps) == (2, 1)


def test_passes_without_gradients_and_the_reference_are_a_seats_own():
    model, own = made(), batch(9, seed=3)
    start(model, 1)
    with torch.no_grad():
        expected = token_losses(model, own)
    with reference(model):
        untouched = token_losses(model, own)
    cohort = Cohort(model, 2)

    def look(number):
        seat = cohort.seats[number]
        start(seat, number)
        with torch.no_grad():
            live = token_losses(seat, own)
        with reference(seat):
            return live, token_losses(seat, own)

    _, (live, before) = cohort.run([partial(look, 0), partial(look, 1)])
    assert torch.allclose(live, expected, atol=1e-5)
    assert torch.allclose(before, untouched, atol=1e-5)
    assert not torch.allclose(live, before, atol=1e-3)


def test_a_programming_error_ends_the_others_and_leaves_the_model_as_it_was():
    model = made()
    cohort, plain = Cohort(model, 2), {m: m.forward for m in model.module.modules()}
    threads = threading.active_count()

    def wrong():
        token_losses(cohort.seats[1], batch(4))
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        cohort.run([partial(train, cohort.seats[0], 0, [[(9,)]] * 3), wrong])
    assert threading.active_count() == threads
    assert all(m.forward == f for m, f in plain.items())
    assert not model.module.training
    start(model, 0)
    assert torch.isfinite(token_losses(model, batch(5))).all()  # and the cohort can be used again
    assert len(cohort.run([partial(train, cohort.seats[0], 0, [[(9,)]])])) == 1


def test_a_runner_goes_on_only_when_it_is_told_to():
    said = []

    def work():
        said.append(1)
        runner.pause()
        said.append(2)
        return "done"

    runner = Runner(work)
    assert said == []
    runner.go_on()
    assert said == [1]
    assert not runner.done
    runner.go_on()
    assert (said, runner.done, runner.result) == ([1, 2], True, "done")

    stopped = Runner(lambda: stopped.pause())
    stopped.go_on()
    stopped.stop()
    assert stopped.done
    assert not issubclass(Stopped, Exception)


def test_what_cannot_sit_in_a_cohort_is_known_by_its_adapter_or_by_trying():
    assert refusal(made()) == ""
    assert "lora_magnitude_vector" in refusal(made(dora=True))
    assert "head" in refusal(made(target_modules=["q_proj", "lm_head"]))
    mixing = made()
    layer = mixing.causal_lm.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) + x.mean(dim=1, keepdim=True)  # tokens of all clients meet here
    assert "does not give clients" in refusal(mixing)


def test_sizes_are_timed_until_one_is_slower_and_the_model_is_left_as_it_was():
    model = made()
    before = model.adapter.flat.clone()
    found = speedups(model, [batch(6, seed=i) for i in range(4)], [2, 4])
    assert set(found) <= {2, 4}
    assert all(ratio > 0 for ratio in found.values())
    assert torch.equal(model.adapter.flat, before)
    assert not model.grad.any()


def test_a_loss_that_runs_backward_by_itself_is_noticed_and_one_of_the_adapter_alone_is_added():
    model = made()
    cohort = Cohort(model, 2)

    def by_itself(number):
        token_losses(cohort.seats[number], batch(4)).mean().backward()

    with pytest.raises(RuntimeError, match="in a cohort, where the base is shared"):
        cohort.run([partial(by_itself, number) for number in range(2)])

    def norm_only(number):
        seat = cohort.seats[number]
        start(seat, number)
        seat.grad.zero_()
        seat.backward(seat.parameter.square().sum() / 2)

    cohort.run([partial(norm_only, number) for number in range(2)])
    assert all(torch.allclose(seat.grad, seat.adapter.flat) for seat in cohort.seats)
