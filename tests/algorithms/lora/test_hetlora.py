"""HetLoRA: zero-padding, weights by norm, truncation, and ranks that shrink."""

from __future__ import annotations

import pytest
import torch

from fedloom.algorithms.lora.hetlora import RANK
from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import Payload
from tests.helpers.lora_rounds import CLIENTS, client, drawn, models, server, trained


def test_equal_ranks_and_norms_equal_fedit():
    algorithm, plain = server("hetlora"), server("fedit")
    updates = [type(u)(u.client, 1, u.payload, num_examples=1) for u in drawn(algorithm)]
    sizes = [algorithm.weight(u) for u in updates]
    for update, size in zip(updates, sizes, strict=True):  # ‖ΔW‖ is quadratic in the adapter
        for t in update.payload.tensors.values():
            t.mul_((sizes[0] / size) ** 0.5)
    algorithm.aggregate(iter(updates))
    plain.aggregate(iter(updates))
    assert torch.allclose(algorithm.shared.flat, plain.shared.flat, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weight_by", ["norm", "norm_and_examples"])
def test_padded_and_weighted_by_norm(weight_by):
    algorithm = server("hetlora", {"a": 1, "b": 2}, weight_by=weight_by)
    updates = drawn(algorithm)
    for t in updates[0].payload.tensors.values():
        t.mul_(2)
    weights = []
    for u in updates:
        dense = [2 * u.payload.tensors[p.b].double() @ u.payload.tensors[p.a].double() for p in algorithm.pairs]
        norm = float(sum(d.norm() ** 2 for d in dense)) ** 0.5
        weights.append(norm * (CLIENTS[u.client] if weight_by == "norm_and_examples" else 1))
    algorithm.aggregate(iter(updates))
    for p in algorithm.pairs:
        a, b = (torch.zeros(algorithm.shared.views[n].shape, dtype=torch.float64) for n in (p.a, p.b))
        for w, u in zip(weights, updates, strict=True):
            r = u.payload.tensors[p.a].shape[0]
            a[:r] += w / sum(weights) * u.payload.tensors[p.a]
            b[:, :r] += w / sum(weights) * u.payload.tensors[p.b]
        assert torch.allclose(algorithm.shared.views[p.a].double(), a, atol=1e-7)
        assert torch.allclose(algorithm.shared.views[p.b].double(), b, atol=1e-7)


def test_rows_that_nobody_had_stay():
    algorithm = server("hetlora", {"a": 1})
    before = algorithm.shared.snapshot().views
    algorithm.aggregate(iter(drawn(algorithm)[:1]))
    for p in algorithm.pairs:
        assert torch.equal(algorithm.shared.views[p.a][1:], before[p.a][1:])
        assert not torch.equal(algorithm.shared.views[p.a][:1], before[p.a][:1])


def test_updates_of_nothing_count_alike():
    algorithm = server("hetlora")
    updates = drawn(algorithm)
    for u in updates:
        for p in algorithm.pairs:
            u.payload.tensors[p.b].zero_()
    algorithm.aggregate(iter(updates))
    p = algorithm.pairs[0]
    mean = sum(u.payload.tensors[p.a].double() for u in updates) / 3
    assert torch.allclose(algorithm.shared.views[p.a].double(), mean, atol=1e-8)


@pytest.mark.parametrize(("gamma", "kept"), [(0.1, 1), (0.5, 1), (0.67, 2), (0.99, 2)])
def test_the_penalty_is_the_paper_s(gamma, kept):
    """λ Σ ‖B[:, γr:]‖ ‖A[γr:, :]‖ written out over single numbers, and its gradient by autograd; r = 3 rows, γr kept."""
    of = models()
    algorithm = client("hetlora", of, gamma=gamma, penalty=0.7)
    central = server("hetlora", of=of)
    central.aggregate(iter(drawn(central)))
    algorithm.begin("a", 1, None)
    algorithm.receive(central.round_payload("a"))
    model = of.adapted()
    own = {n: t.detach().double().clone().requires_grad_() for n, t in model.adapter.views.items()}
    total = torch.zeros((), dtype=torch.float64)
    for a in (n for n in own if "lora_A" in n):
        b = a.replace("lora_A", "lora_B")
        b_tail = sum(own[b][i, j] ** 2 for i in range(own[b].shape[0]) for j in range(kept, 3))
        a_tail = sum(own[a][i, j] ** 2 for i in range(kept, 3) for j in range(own[a].shape[1]))
        total = total + (b_tail**0.5) * (a_tail**0.5)
    (0.7 * total).backward()
    assert algorithm._tail_size() == pytest.approx(float(total.detach()), rel=1e-6)
    started = torch.randn(model.grad.shape, generator=torch.Generator().manual_seed(0))
    model.grad.copy_(started)
    algorithm.before_step(model)
    views = model.adapter.layout.views(model.grad - started)
    for name, tensor in own.items():
        expected = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        assert torch.allclose(views[name].double(), expected, rtol=1e-5, atol=1e-6), name
        safe = views[name][:kept] if "lora_A" in name else views[name][:, :kept]
        assert not safe.any() and views[name].any()


@pytest.mark.parametrize("options", [{"gamma": 0.5, "penalty": 0.0}, {"penalty": 0.7}])
def test_without_gamma_or_penalty_no_gradient_is_touched(options):
    of = models()
    algorithm, central = client("hetlora", of, **options), server("hetlora", of=of)
    central.aggregate(iter(drawn(central)))
    algorithm.begin("a", 1, None)
    algorithm.receive(central.round_payload("a"))
    model = of.adapted()
    model.grad.zero_()
    algorithm.before_step(model)
    assert not model.grad.any()


def test_a_client_whose_tail_shrank_goes_on_with_less_and_the_server_follows():
    of = models()
    options = {"gamma": 0.67, "penalty": 50.0}
    algorithm, central = client("hetlora", of, **options), server("hetlora", of=of, **options)
    central.aggregate(iter(drawn(central)))
    sent = trained(algorithm, central.round_payload("a"), "a", optimizer="sgd", lr=1e-2, clip=None)
    assert {t.shape[0] for n, t in sent.tensors.items() if "lora_A" in n} == {2}
    update = type(drawn(central)[0])("a", 1, sent, num_examples=1)
    central.accept(update)
    central.aggregate(iter([update]))
    assert central.rank_of("a") == 2 and central.rank_of("b") == 3
    again = server("hetlora", of=of, **options)
    again.load_server_state(from_bytes(to_bytes(central.server_state())))
    assert (
        again.rank_of("a") == 2 and again.round_payload("a").tensors.keys() == central.round_payload("a").tensors.keys()
    )
    # The update that said so may be lost: the client knows by itself.
    algorithm.begin("a", 2, Payload({RANK: torch.tensor(2)}))
    algorithm.receive(Payload(central.shared.tensors()))
    assert algorithm.own == 2 and not any(algorithm.model.adapter.views[p.a][2:].any() for p in algorithm.pairs)


def test_without_gamma_nothing_is_pruned_and_a_lower_rank_is_refused():
    of = models()
    algorithm, central = client("hetlora", of), server("hetlora", of=of)
    central.aggregate(iter(drawn(central)))
    sent = trained(algorithm, central.round_payload("a"), "a", weight_decay=0.5)
    assert {t.shape[0] for n, t in sent.tensors.items() if "lora_A" in n} == {3}
    assert algorithm.client_state().tensors == {}
    lower = drawn(server("hetlora", {"a": 2}))[0]
    with pytest.raises(ValueError, match="misshapen"):
        central.accept(lower)


def test_the_ranks_of_a_round_are_told():
    algorithm = server("hetlora", {"a": 1, "b": 2})
    assert algorithm.aggregate(iter(drawn(algorithm))) == {"highest_rank": 3.0, "lowest_rank": 1.0}
    assert algorithm.aggregate(iter(drawn(algorithm)[1:2])) == {"highest_rank": 2.0, "lowest_rank": 2.0}
