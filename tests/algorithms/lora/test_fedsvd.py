"""FedSVD: the product is unchanged, A's rows are orthonormal, and A only moves on the server."""

from __future__ import annotations

import torch

from fedloom.algorithms.lora.fedsvd import orthogonalised
from fedloom.models.lowrank import relative_gap
from tests.helpers.lora_rounds import client, drawn, learned, models, result, server, trained


def test_product_unchanged_and_a_orthonormal():
    algorithm = server("fedsvd")
    for seed in range(3):
        updates = drawn(algorithm, seed)
        exact = learned(algorithm, updates)  # under the A that the clients had
        algorithm.aggregate(iter(updates))
        assert relative_gap(result(algorithm), exact) <= 1e-6
        for p in algorithm.pairs:
            a = algorithm.shared.views[p.a].double()
            assert (a @ a.T - torch.eye(len(a), dtype=torch.float64)).abs().max() <= 1e-6
            b = algorithm.shared.views[p.b].double()
            gram = b.T @ b  # U Σ: columns orthogonal, the largest first
            assert (gram - gram.diag().diag()).abs().max() <= 1e-6 * gram.max()
            assert torch.equal(gram.diag().sort(descending=True).values, gram.diag())


def test_in_float64():
    draw = torch.Generator().manual_seed(0)
    b, a = (
        torch.randn(9, 3, generator=draw, dtype=torch.float64),
        torch.randn(3, 7, generator=draw, dtype=torch.float64),
    )
    turned = orthogonalised(b, a)
    assert (turned.dense() - b @ a).norm() <= 1e-12 * (b @ a).norm()
    b[:, 2] = 0  # a rank that is not full still has an orthonormal A
    flat = orthogonalised(b, a)
    assert (flat.a @ flat.a.T - torch.eye(3, dtype=torch.float64)).abs().max() <= 1e-12


def test_a_is_frozen_while_clients_train_and_only_b_goes_up():
    of = models()
    central, algorithm = server("fedsvd", of=of), client("fedsvd", of)
    central.aggregate(iter(drawn(central)))
    down = central.round_payload("a")
    assert down.tensors.keys() == central.shared.views.keys()
    sent = trained(algorithm, down, weight_decay=0.1)
    assert all("lora_B" in n for n in sent.tensors)
    assert all(torch.equal(algorithm.model.adapter.views[p.a], central.shared.views[p.a]) for p in central.pairs)
