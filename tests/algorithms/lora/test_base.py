"""What the LoRA-aware algorithms share: ranks on the wire and in the live buffer, the base-delta channel, refusals."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.lora.base import at_rank, of_rank, padded
from fedloom.algorithms.lora.base_delta import BaseDelta
from fedloom.algorithms.lora.fedrot_lora import aligned
from fedloom.algorithms.lora.lora_fair import refined
from fedloom.common.errors import UserError
from fedloom.messages.types import Payload
from fedloom.models.lowrank import LowRank, subspace_iteration
from tests.helpers.lora_rounds import client, drawn, local_run, models, server, trained

MIXED = ("flora", "flexlora", "hetlora")
DOUBLE = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_lower_rank_stays_one_bit_for_bit(name, optimizer):
    """Zero rows of A and zero columns of B have no gradient: neither weight decay nor momentum moves them."""
    of = models({"a": 1})
    algorithm = client(name, of)
    start = server(name, of=of)
    start.aggregate(iter(drawn(start)))
    sent = trained(algorithm, start.round_payload("a"), optimizer=optimizer, weight_decay=0.1, momentum=0.9, steps=4)
    live = of.adapted().adapter.views
    for p in algorithm.pairs:
        assert sent.tensors[p.a].shape[0] == 1 and sent.tensors[p.b].shape[1] == 1
        assert torch.equal(live[p.a][:1], sent.tensors[p.a]) and live[p.b][:, :1].any()
        for rest in (live[p.a][1:], live[p.b][:, 1:]):
            assert not rest.contiguous().view(torch.int32).any()  # +0.0, every bit of it


@pytest.mark.parametrize("name", MIXED)
def test_traffic_follows_the_rank(name):
    algorithm = server(name, {"a": 1, "b": 2})
    sizes = [sum(t.numel() for t in u.payload.tensors.values()) for u in drawn(algorithm)]
    assert sizes[0] * 2 == sizes[1] and sizes[0] * 3 == sizes[2]
    if name != "flora":  # which sends no factors down
        down = [sum(t.numel() for t in algorithm.round_payload(c).tensors.values()) for c in "abc"]
        assert down == sizes


@pytest.mark.parametrize("name", MIXED)
def test_each_client_must_send_its_own_rank(name):
    algorithm = server(name, {"a": 1})
    a, b, _ = drawn(algorithm)
    with pytest.raises(ValueError, match="misshapen"):
        algorithm.accept(type(a)("a", 1, b.payload, num_examples=1))
    with pytest.raises(ValueError, match="misshapen"):
        algorithm.accept(type(a)("b", 1, a.payload, num_examples=1))
    broken = dict(a.payload.tensors)
    broken[next(iter(broken))] = torch.full_like(broken[next(iter(broken))], torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        algorithm.accept(type(a)("a", 1, Payload(broken), num_examples=1))


def test_cut_and_padded_are_each_other_s_inverse():
    algorithm = server("hetlora")
    whole = {n: torch.ones(s) for n, s in algorithm.shared.layout.shapes.items()}
    back = padded(of_rank(whole, 2), algorithm.shared.layout)
    assert of_rank(back, 2).keys() == whole.keys()
    for n, t in of_rank(back, 2).items():
        assert torch.equal(t, of_rank(whole, 2)[n]) and back[n].sum() == t.sum()
        assert t.is_contiguous() and t.shape == at_rank(algorithm.shared.layout, 2).shapes[n]
    mixed = {**of_rank(whole, 2), algorithm.pairs[0].a: whole[algorithm.pairs[0].a][:1]}
    with pytest.raises(ValueError, match="misshapen"):
        padded(mixed, algorithm.shared.layout)


def test_an_adapter_that_is_more_than_two_factors_is_refused():
    of = models(dora=True)
    with pytest.raises(UserError, match="two factors"):
        server("fedit", of=of)


# ------------------------------------------------------------------ the base delta


def test_a_delta_adds_up_compressed_or_not():
    delta, exact = BaseDelta(), torch.zeros(20, 12, dtype=DOUBLE)
    shapes = []
    for step in range(8):  # 3 columns a time: stacked, compressed at 12·20 < R·32, dense in the end
        change = LowRank(random(20, 3, seed=step), random(3, 12, seed=100 + step))
        delta.add("w", change)
        exact += change.dense()
        held = delta.tensors()
        now = held["w"].double() if "w" in held else held["w.B"].double() @ held["w.A"].double()
        shapes.append(sorted(held))
        assert (now - exact).norm() <= 3e-7 * exact.norm()
        assert sum(t.numel() for t in held.values()) <= 20 * 12
        assert all(t.dtype == torch.float32 for t in held.values())
    assert shapes[0] == ["w.A", "w.B"] and shapes[-1] == ["w"]


def test_a_delta_of_little_rank_stays_factors():
    b, a = random(20, 2), random(2, 12)
    delta = BaseDelta()
    for step in range(20):
        delta.add("w", LowRank(b * (step + 1), a))
    assert delta.tensors()["w.B"].shape[1] <= 7
    total = delta.tensors()["w.B"].double() @ delta.tensors()["w.A"].double()
    assert (total - 210 * b @ a).norm() <= 1e-6 * (210 * b @ a).norm()


def test_compression_keeps_what_is_small():
    """A late change a thousand times smaller than what is there is still there, to a few parts in a thousand of itself."""
    delta, b, a = BaseDelta(), random(20, 2), random(2, 12)
    small = LowRank(1e-3 * random(20, 1, seed=5), random(1, 12, seed=6))
    delta.add("w", small)
    for _ in range(12):
        delta.add("w", LowRank(b, a))
    left = delta.tensors()["w.B"].double() @ delta.tensors()["w.A"].double() - 12 * b @ a
    assert delta.tensors()["w.B"].shape[1] <= 7
    assert (left - small.dense()).norm() <= 5e-3 * small.norm()


def test_a_delta_survives_its_names():
    delta = BaseDelta()
    delta.add("w", LowRank(random(20, 1), random(1, 12)))
    delta.add("v.weight", LowRank(random(4, 4), random(4, 4)))
    again = BaseDelta.of(delta.prefixed())
    assert again.tensors().keys() == delta.tensors().keys() == {"v.weight", "w.A", "w.B"}
    assert all(torch.equal(t, again.tensors()[n]) for n, t in delta.tensors().items())
    with pytest.raises(ValueError, match="without its other factor"):
        BaseDelta.of({"delta/w.B": torch.ones(2, 1)})


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_client_s_base_is_put_right_by_every_payload(name):
    """A late client gets all of the delta, and one payload after another leaves nothing of the last."""
    of = models()
    first, later = server(name, of=of), server(name, of=of)
    for seed in (1, 2):
        later.aggregate(iter(drawn(later, seed)))
    weights = of.adapted().base_weights()
    before = {p.weight: weights[p.weight].clone() for p in first.pairs}
    half = client(name, of)
    half.begin("late", 3, None)
    half.receive(later.round_payload("late"))
    deployed = later.deployed()
    of.adapted().set_base_delta(deployed.base_delta)
    expected = {w: weights[w].clone() for w in before}
    half.receive(later.round_payload("late"))
    assert all(torch.equal(weights[w], expected[w]) for w in before)
    assert any(not torch.equal(weights[w], before[w]) for w in before)
    assert half.deployed("late").base_delta.keys() == deployed.base_delta.keys()
    half.receive(first.round_payload("late"))
    assert all(torch.equal(weights[w], before[w]) for w in before)


# ------------------------------------------------------------------ arithmetic


def test_compact_keeps_the_product_and_drops_what_is_nothing():
    low = LowRank(random(30, 4), random(4, 10))
    doubled = low.plus(low, 0.5)
    assert doubled.rank == 8 and doubled.compact().rank == 4
    assert (doubled.compact().dense() - 1.5 * low.dense()).norm() <= 1e-12 * low.norm()
    assert LowRank(low.b * 0, low.a).compact().rank == 0


def test_factorisations_do_not_depend_on_the_number_of_threads():
    """By themselves QR, SVD and thin products of these sizes do."""
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        low = LowRank(random(1536, 120), random(120, 576))
        best = subspace_iteration(random(576, 700), 8, torch.Generator().manual_seed(0))
        u, s, vh = low.svd()
        pair = refined([0.5, 0.5], [random(1536, 8), random(1536, 8, seed=1)], [random(8, 700), random(8, 700)], 0.1)
        turned = aligned(random(1536, 8), random(8, 700), random(1536, 8, seed=1), random(8, 700, seed=1))
        found.append([u, s, vh, best.b, best.a, torch.tensor(low.norm()), pair.b, *turned, low.dense()])
        assert torch.get_num_threads() == threads
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_leading_directions_of_a_dense_matrix():
    u, _, vh = torch.linalg.svd(random(60, 40), full_matrices=False)
    s = 0.9 ** torch.arange(40, dtype=DOUBLE)
    matrix = (u * s) @ vh
    found = subspace_iteration(matrix, 5, torch.Generator().manual_seed(0))
    best = s[5:].norm()
    assert best * (1 - 1e-9) <= (matrix - found.dense()).norm() <= best * 1.001


def test_the_optimiser_steps_a_parameter_of_the_algorithm_s_own():
    """And leaves the adapter to the algorithm; clipping sees that parameter's gradient alone."""
    algorithm = client("fedit", models())
    algorithm.begin("a", 1, None)
    before = algorithm.model.adapter.flat.clone()
    own = torch.nn.Parameter(torch.zeros(3))
    own.grad = torch.zeros(3)
    algorithm.before_step = lambda model: own.grad.copy_(torch.tensor([3.0, 4.0, 0.0]))
    local_run(algorithm, optimizer="sgd", lr=1.0, steps=2, clip=1.0).fit(algorithm, own)
    assert torch.allclose(own, torch.tensor([-1.2, -1.6, 0.0]), atol=1e-5)
    assert torch.equal(algorithm.model.adapter.flat, before)
