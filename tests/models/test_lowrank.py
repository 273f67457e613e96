"""Low-rank arithmetic against the dense product, which it never forms."""

from __future__ import annotations

import pytest
import torch

from fedloom.models.lowrank import LoraPair, LowRank, find_lora_pairs, one_thread, relative_gap, subspace_iteration


def low(rank: int, seed: int = 0, out: int = 7, into: int = 5) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((out, rank), (rank, into)))
    return LowRank(b, a)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-12)


def nearest(dense: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of a dense matrix by one of this rank, from its own singular values."""
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    s[rank:] = 0
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 9])
def test_truncated_is_the_best_approximation_and_has_the_rank_that_was_asked_for(rank):
    """Rank 3 in a 7 × 5 matrix: cut below 3, and padded with zeros above."""
    three = low(3)
    cut = three.truncate(rank)
    assert (cut.b.shape, cut.a.shape) == ((7, rank), (rank, 5))
    assert close(cut.dense(), nearest(three.dense(), rank))
    assert torch.equal(cut.b[:, 3:], torch.zeros(7, max(0, rank - 3), dtype=torch.float64))
    assert torch.equal(cut.a[3:], torch.zeros(max(0, rank - 3), 5, dtype=torch.float64))
    assert cut.b.dtype == cut.a.dtype == torch.float64
    sizes = cut.b.norm(dim=0), cut.a.norm(dim=1)
    assert close(*sizes)  # B = U√S and A = √S Vh: both carry half
    single = three.single().truncate(rank)
    assert single.b.dtype == single.a.dtype == torch.float32 and single.b.shape == (7, rank)


def test_more_columns_than_the_matrix_is_wide_are_cut_to_what_it_has():
    wide = low(9)
    u, s, vh = wide.svd()
    assert (u.shape, s.shape, vh.shape) == ((7, 5), (5,), (5, 5))
    assert close(u @ torch.diag(s) @ vh, wide.dense())
    assert close(wide.truncate(6).dense(), wide.dense())


def test_the_signs_of_singular_vectors_are_fixed():
    """In the basis of B's QR the largest entry of each left vector is positive; a zero matrix has signs too."""
    for seed in range(4):
        three = low(3, seed)
        u, s, vh = three.svd()
        inside = torch.linalg.qr(three.b)[0].T @ u
        assert bool((inside[inside.abs().argmax(dim=0), torch.arange(3)] > 0).all())
        assert close(u @ torch.diag(s) @ vh, three.dense())
        assert close(u.T @ u, torch.eye(3, dtype=torch.float64))
        assert close(vh @ vh.T, torch.eye(3, dtype=torch.float64))


def test_sums_and_norms_are_those_of_the_dense_products():
    one, two = low(2, 1), low(3, 2)
    both = LowRank.stack([(0.25, one.b, one.a), (-2.0, two.b, two.a)])
    assert both.rank == 5
    assert close(both.dense(), 0.25 * one.dense() - 2.0 * two.dense())
    assert close(one.plus(two, -0.5).dense(), one.dense() - 0.5 * two.dense())
    assert close(one.plus(two).dense(), one.dense() + two.dense())
    assert both.norm() == pytest.approx(float(both.dense().norm()), rel=1e-12)
    assert one.plus(one, -1.0).norm() < 1e-14


def test_a_compact_form_is_the_same_product_with_as_few_columns_as_it_needs():
    one = low(2, 1)
    twice = one.plus(one, 3.0).plus(one, -1.0)
    assert (twice.rank, twice.compact().rank) == (6, 2)
    assert close(twice.compact().dense(), 3.0 * one.dense())
    assert low(5).compact().rank == 5
    assert LowRank(torch.zeros(7, 3), torch.zeros(3, 5)).compact().rank == 0
    single = twice.single().compact()
    assert single.b.dtype == single.a.dtype == torch.float32
    assert torch.allclose(single.dense(), 3.0 * one.single().dense(), atol=1e-5)


@pytest.mark.parametrize(("tolerance", "rank"), [(1e-7, 3), (0.009, 3), (0.011, 2), (0.0999, 2), (0.11, 1)])
def test_what_compact_drops_has_at_most_that_share_of_the_norm(tolerance, rank):
    """Singular values 1, 0.1 and 0.01."""
    q = torch.linalg.qr(low(3).b)[0]
    p = torch.linalg.qr(low(3).a.T)[0].T
    assert LowRank(q * torch.tensor([1.0, 0.1, 0.01]), p).compact(tolerance).rank == rank


def test_gaps_are_over_all_weights_together():
    exact = {"x": low(2, 1), "y": low(2, 2)}
    total = sum(float(e.dense().norm()) ** 2 for e in exact.values()) ** 0.5
    assert relative_gap(exact, exact) < 1e-14
    assert relative_gap({}, exact) == pytest.approx(1.0)
    missing = float(exact["y"].dense().norm()) / total
    assert relative_gap({"x": exact["x"]}, exact) == pytest.approx(missing)
    other = {"x": low(2, 3), "y": exact["y"]}
    gap = float((other["x"].dense() - exact["x"].dense()).norm())
    assert relative_gap(other, exact) == pytest.approx(gap / total)
    nothing = {"x": LowRank(torch.zeros(7, 1, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64))}
    assert relative_gap(nothing, nothing) == 0.0
    assert relative_gap({"x": low(2)}, nothing) == pytest.approx(float(low(2).dense().norm()))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_leading_directions_of_a_dense_matrix(rank):
    dense = low(5).dense()
    found = subspace_iteration(dense, rank, torch.Generator().manual_seed(3))
    assert (found.b.shape, found.a.shape) == ((7, rank), (rank, 5))
    assert close(found.dense(), nearest(dense, rank))


def test_leading_directions_of_a_matrix_wider_than_what_is_drawn():
    """60 singular values, 0.8 apart: 8 directions to spare and 8 rounds reach the leading 4."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(60, 60, generator=draw, dtype=torch.float64))[0] for _ in range(2))
    dense = u @ torch.diag(0.8 ** torch.arange(60, dtype=torch.float64)) @ v.T
    found = subspace_iteration(dense, 4, torch.Generator().manual_seed(1))
    assert float((found.dense() - nearest(dense, 4)).norm()) < 1e-6
    rough = subspace_iteration(dense, 4, torch.Generator().manual_seed(1), rounds=0)
    assert float((rough.dense() - nearest(dense, 4)).norm()) > 1e-3


def test_modules_are_found_by_their_two_factors():
    stem = "base_model.model.layers.0.q_proj"
    names = [
        "other.weight",
        f"{stem}.lora_A.weight",
        f"{stem}.lora_B.weight",
        "head.lora_B.weight",
        "head.lora_A.weight",
    ]
    assert find_lora_pairs(names) == [
        LoraPair(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", "layers.0.q_proj.weight"),
        LoraPair("head.lora_A.weight", "head.lora_B.weight", "head.weight"),
    ]
    assert find_lora_pairs(iter(names[:1])) == []
    with pytest.raises(ValueError, match=r"x\.lora_A\.weight has no partner x\.lora_B\.weight"):
        find_lora_pairs(["x.lora_A.weight"])


def test_one_thread_inside_and_as_many_as_before_after():
    @one_thread()
    def fails() -> None:
        assert torch.get_num_threads() == 1
        raise ValueError("out")

    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="out"):
            fails()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
