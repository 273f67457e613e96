"""Server optimisers and DiLoCo: closed forms written out in fp64, FedAvg bit for bit under neutral options."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.averaging_rounds import drawn, flat, saved, server, update

ROUNDS = 4
WEIGHTS = (1, 3)


def rounds(number):
    """Two clients' tensors of a round, 1 and 3 examples."""
    return [update(f"c{k}", drawn(10 * number + k, 0.01), w) for k, w in enumerate(WEIGHTS)]


def followed(name, start, **options):
    """(θ_0, [d_1, d_2, …], [θ_1, θ_2, …]) in fp64, d_t by hand from θ_{t−1} and the clients' tensors."""
    algorithm = server(name, start, **options)
    gradients, path = [], []
    for number in range(1, ROUNDS + 1):
        updates = rounds(number)
        mean = sum(w * flat(u.payload.tensors) for u, w in zip(updates, WEIGHTS, strict=True)) / 4
        gradients.append(flat(algorithm.shared.tensors()) - mean)
        algorithm.aggregate(iter(updates))
        path.append(flat(algorithm.shared.tensors()))
    return flat(start), gradients, path


def assert_path(theta, gradients, path, step):
    for number, (d, seen) in enumerate(zip(gradients, path, strict=True), 1):
        expected = (theta if number == 1 else path[number - 2]) - step(d)
        assert torch.allclose(seen, expected, rtol=2e-6, atol=1e-8), number


def test_momentum_by_hand():
    theta, gradients, path = followed("fedavgm", drawn(1, 0.02), lr=0.3, momentum=0.8)
    m = torch.zeros_like(theta)

    def step(d):
        nonlocal m
        m = 0.8 * m + d
        return 0.3 * m

    assert_path(theta, gradients, path, step)


def test_adagrad_by_hand():
    theta, gradients, path = followed("fedadagrad", drawn(1, 0.02), lr=0.05, beta1=0.4, tau=0.003)
    m, v = torch.zeros_like(theta), torch.full_like(theta, 0.003**2)

    def step(d):
        nonlocal m, v
        m = 0.4 * m + 0.6 * d
        v = v + d * d
        return 0.05 * m / (v.sqrt() + 0.003)

    assert_path(theta, gradients, path, step)


def test_adam_by_hand():
    theta, gradients, path = followed("fedadam", drawn(1, 0.02), lr=0.05, beta1=0.7, beta2=0.9, tau=0.003)
    m, v = torch.zeros_like(theta), torch.full_like(theta, 0.003**2)

    def step(d):
        nonlocal m, v
        m = 0.7 * m + 0.3 * d
        v = 0.9 * v + 0.1 * d * d
        return 0.05 * m / (v.sqrt() + 0.003)  # neither moment is corrected for its start

    assert_path(theta, gradients, path, step)


def test_yogi_by_hand():
    theta, gradients, path = followed("fedyogi", drawn(1, 0.02), lr=0.05, beta1=0.7, beta2=0.6, tau=0.01)
    m, v = torch.zeros_like(theta), torch.full_like(theta, 0.01**2)
    grew = shrank = False

    def step(d):
        nonlocal m, v, grew, shrank
        m = 0.7 * m + 0.3 * d
        grew, shrank = grew or bool((d * d > v).any()), shrank or bool((d * d < v).any())
        v = torch.where(v > d * d, v - 0.4 * d * d, v + 0.4 * d * d)
        return 0.05 * m / (v.sqrt() + 0.01)

    assert_path(theta, gradients, path, step)
    assert grew and shrank  # both branches of the sign were taken


@pytest.mark.parametrize(("name", "nesterov"), [("fedavgm", False), ("diloco", True)])
def test_momentum_is_that_of_torch(name, nesterov):
    theta, gradients, path = followed(name, drawn(1, 0.02), lr=0.7, momentum=0.9)
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=nesterov)
    for d, seen in zip(gradients, path, strict=True):
        parameter.grad = d
        optimizer.step()
        assert torch.allclose(seen, parameter, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["fedavgm", "diloco"])
def test_rate_one_without_momentum_is_fedavg_bit_for_bit(name):
    """At all sizes: θ − (θ − mean) in floating point is the mean only where the two are alike."""
    start = drawn(1, 1e4)
    mine, plain = server(name, start, lr=1.0, momentum=0.0), server("fedavg", start)
    for number, size in enumerate((1e-12, 1e5, 1e-3, 7.0), 1):
        clients = [(f"c{k}", drawn(10 * number + k, size), k + 1) for k in range(5)]
        for algorithm in (mine, plain):
            algorithm.aggregate(update(*c) for c in clients)
        assert mine.shared.sha256() == plain.shared.sha256(), size


def test_the_mean_is_weighted_as_the_recipe_says():
    start = drawn(1)
    for name in ("fedadam", "diloco"):
        by_examples, by_tokens = server(name, start), server(name, start, weight_by="tokens")
        for algorithm in (by_examples, by_tokens):
            one, other = update("x", drawn(2), 1), update("y", drawn(3), 5)
            object.__setattr__(other, "num_tokens", 1)
            algorithm.aggregate(iter([one, other]))
        assert by_examples.shared.sha256() != by_tokens.shared.sha256()


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco"])
def test_a_server_that_comes_back_from_disk_goes_on_bit_for_bit(name):
    start = drawn(1, 0.02)
    undisturbed = server(name, start)
    for number in (1, 2):
        undisturbed.aggregate(iter(rounds(number)))
    back = server(name, start)
    back.load_server_state(saved(undisturbed))
    for algorithm in (undisturbed, back):
        algorithm.aggregate(iter(rounds(3)))
    assert undisturbed.shared.sha256() == back.shared.sha256()
    one, other = saved(undisturbed), saved(back)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco"])
def test_moments_stay_on_the_server_and_a_damaged_state_is_refused(name):
    algorithm = server(name, drawn(1))
    algorithm.aggregate(iter(rounds(1)))
    assert algorithm.round_payload("c0").tensors.keys() == {"a", "b"}
    state = saved(algorithm)
    del state.tensors["m/a"]
    with pytest.raises(ValueError, match="missing: m/a"):
        server(name, drawn(1)).load_server_state(state)
