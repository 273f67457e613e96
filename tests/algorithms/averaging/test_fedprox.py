"""FedProx: its penalty's gradient, how it shares itself out over accumulation, and both ends of μ."""

from __future__ import annotations

import pytest
import torch

from fedloom.data.batching import collate
from fedloom.messages.types import Payload
from fedloom.recipe.recipe import TrainConfig
from tests.helpers.averaging_rounds import adapted, local_run, made, sequences

#: Two forward passes of one step with unequal numbers of labels.
BATCHES = [
    collate(sequences(1)[:5], packed=True, pad=3, examples=range(5)),
    collate(sequences(2)[:1], packed=True, pad=3, examples=range(1)),
]
TOKENS = sum(len(b.labels) for b in BATCHES)


def fedprox(model, mu):
    algorithm = made("fedprox", mu=mu)
    algorithm.model = model
    algorithm.receive(Payload(model.initial_adapter().tensors()))
    return algorithm


def loss_of(algorithm, model):
    return sum(algorithm.local_loss(model, b, TOKENS) for b in BATCHES)


def away(model):
    """The live adapter moved by a known step from what was received."""
    step = torch.randn(model.adapter.layout.numel, generator=torch.Generator().manual_seed(5)) * 0.2
    model.adapter.flat.copy_(model.initial + step)
    return (model.adapter.flat - model.initial).double()


def test_the_gradient_by_finite_differences():
    model = adapted()
    algorithm = fedprox(model, mu=3.0)
    away(model)
    here = model.adapter.flat.clone()
    model.grad.zero_()
    loss_of(algorithm, model).backward()
    gradient = model.grad.double().clone()
    for seed in range(3):
        direction = torch.randn(len(here), generator=torch.Generator().manual_seed(seed))
        direction /= direction.norm()
        values = []
        for side in (-1, 1):
            model.adapter.flat.copy_(here + side * 0.02 * direction)
            with torch.no_grad():
                values.append(float(loss_of(algorithm, model)))
        difference = (values[1] - values[0]) / 0.04
        assert difference == pytest.approx(float(gradient @ direction.double()), rel=5e-3, abs=2e-3)


def test_contributions_over_accumulation_add_up_to_one_penalty():
    model = adapted()
    algorithm, plain = fedprox(model, mu=3.0), fedprox(model, mu=0.0)
    step = away(model)
    gradients = []
    for learner in (algorithm, plain):
        model.grad.zero_()
        loss_of(learner, model).backward()
        gradients.append(model.grad.double().clone())
    with torch.no_grad():
        penalty = float(loss_of(algorithm, model) - loss_of(plain, model))
    assert penalty == pytest.approx(1.5 * float(step.square().sum()), rel=1e-4)
    assert torch.allclose(gradients[0] - gradients[1], 3.0 * step, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.module.parameters() if not p.requires_grad)


def distance(mu, lr, steps=6):
    model = adapted()
    algorithm = fedprox(model, mu)
    config = TrainConfig(steps=steps, batch_size=4, lr=lr, optimizer="sgd", schedule="constant", clip=None)
    algorithm.local_training(local_run(model, sequences(1), config))
    return float((model.adapter.flat - model.initial).double().norm())


def test_a_large_mu_leaves_the_broadcast():
    """At the rate 1/μ each step undoes what the ones before it did, so that K steps move no further than one."""
    moved = {mu: distance(mu, 1 / mu) for mu in (1e1, 1e2, 1e3)}
    for mu in (1e2, 1e3):
        assert moved[mu] == pytest.approx(moved[mu / 10] / 10, rel=0.1)
        assert moved[mu] < 0.4 * distance(0.0, 1 / mu)
    assert distance(1.0, 0.05) < distance(0.1, 0.05) < distance(0.0, 0.05)


def test_without_mu_it_is_fedavg_bit_for_bit():
    ends = []
    for name, options in (("fedprox", {"mu": 0.0}), ("fedavg", {}), ("fedprox", {"mu": 0.5})):
        model = adapted()
        algorithm = made(name, **options)
        algorithm.model = model
        algorithm.receive(Payload(model.initial_adapter().tensors()))
        result = algorithm.local_training(local_run(model, sequences(1), TrainConfig(steps=4, batch_size=4, lr=1e-2)))
        ends.append((model.adapter.sha256(), result.loss))
    assert ends[0] == ends[1]
    assert ends[2][0] != ends[1][0]


def test_a_client_is_held_to_this_rounds_broadcast_not_the_first():
    model = adapted()
    algorithm = fedprox(model, mu=3.0)
    away(model)
    algorithm.receive(Payload({n: t.clone() for n, t in model.adapter.tensors().items()}))
    with torch.no_grad():
        held, plain = (float(loss_of(learner, model)) for learner in (algorithm, fedprox(adapted(), 0.0)))
    assert held == pytest.approx(plain, rel=1e-6)
    assert algorithm.shared_state().tensors.keys() == set(model.adapter.layout.names)
