"""Robust rules: their definitions on small numbers, and hostile clients that move them by less than the honest differ."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch

from fedloom.algorithms.robust import coordinatewise as robust
from tests.helpers.averaging_rounds import drawn, flat, server, update

RULES = ("median", "trimmed_mean", "krum", "geometric_median", "norm_bound")

#: Multi-Krum is an option of Krum; the bound is about what honest clients move by below.
SETTINGS = [
    ("median", {}), ("trimmed_mean", {"trim": 0.15}), ("krum", {"hostile": 0.15}),
    ("krum", {"hostile": 0.15, "keep": 4}), ("geometric_median", {}), ("norm_bound", {"bound": 0.5}),
]  # fmt: skip


def result(name, rows, start=None, **options):
    """The aggregate of `rows`, each a dict of tensors or a list of five numbers for tensor b, as fp64."""
    tensors = [r if isinstance(r, dict) else {"b": torch.tensor(r, dtype=torch.float32)} for r in rows]
    algorithm = server(name, start or {n: torch.zeros_like(t) for n, t in tensors[0].items()}, **options)
    metrics = algorithm.aggregate(update(f"c{i}", t) for i, t in enumerate(tensors))
    return flat(algorithm.shared.tensors()), metrics


# ------------------------------------------------------------------ definitions


def test_the_median_of_odd_and_even_counts():
    rows = [[1.0, 9.0], [2.0, 7.0], [10.0, 8.0]]
    assert result("median", rows)[0].tolist() == [2.0, 8.0]
    assert result("median", [*rows, [4.0, 100.0]])[0].tolist() == [3.0, 8.5]  # the mean of the two in the middle
    assert result("median", rows[:1])[0].tolist() == [1.0, 9.0]


def test_the_trimmed_mean_leaves_out_each_end_rounded_up():
    rows = [[float(v)] for v in (0, 1, 2, 3, 4, 5, 6, 7, 8, 1000)]
    for trim, k in ((0.0, 0), (0.1, 1), (0.11, 2), (0.2, 2), (0.49, 4)):
        kept = sorted(r[0] for r in rows)[k : 10 - k]
        value, metrics = result("trimmed_mean", rows, trim=trim)
        assert metrics["trimmed"] == k
        assert value.tolist() == pytest.approx([sum(kept) / len(kept)])
    for few in (1, 2, 3, 4):  # never trimmed to nothing: the median is the end of it
        assert torch.equal(result("trimmed_mean", rows[:few], trim=0.45)[0], result("median", rows[:few])[0])


def krum_by_definition(rows, f):
    """Scores of Blanchard et al., section 4, in plain Python."""
    n = len(rows)
    scores = []
    for i in range(n):
        squares = sorted(sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for j in range(n) if j != i)
        scores.append(sum(squares[: n - f - 2]))
    return scores


@pytest.mark.parametrize("seed", range(6))
def test_krum_and_multi_krum_by_definition(seed):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, 4, generator=draw).tolist()
    for f, share in ((1, 0.1), (2, 0.2), (3, 0.33)):
        scores = krum_by_definition(rows, f)
        ranked = sorted(range(9), key=scores.__getitem__)
        for keep in (1, 3, 9 - f, 9):
            value, metrics = result("krum", rows, hostile=share, keep=keep)
            chosen = ranked[: min(keep, 9 - f)]
            expected = torch.tensor([rows[i] for i in chosen], dtype=torch.float64).mean(dim=0)
            assert metrics == {"distance_moved": metrics["distance_moved"], "assumed_hostile": f, "kept": len(chosen)}
            assert torch.allclose(value, expected, atol=1e-6)


def test_krum_of_few():
    assert result("krum", [[3.0]])[0].tolist() == [3.0]
    assert result("krum", [[1.0], [3.0]])[0].tolist() == [2.0]  # neither is nearer to the other
    assert result("krum", [[0.0], [1.0], [10.0]])[0].tolist() == [1.0]  # of the two closest, the one nearer the third
    value, metrics = result("krum", [[0.0], [0.1], [0.3], [50.0]], hostile=0.4)
    assert metrics["assumed_hostile"] == 0  # four clients fulfil n > 2f + 2 for no other f
    assert value.tolist() == pytest.approx([0.1])


def test_the_geometric_median_in_known_places():
    corners = [[0.0, 0.0], [4.0, 0.0], [2.0, 2 * 3**0.5]]  # equilateral: the centre
    assert result("geometric_median", corners)[0].tolist() == pytest.approx([2.0, 2 / 3**0.5], abs=1e-3)
    flat_triangle = [[-5.0, 0.1], [0.0, 0.0], [5.0, 0.1]]  # an angle over 120°: that corner
    assert result("geometric_median", flat_triangle)[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-2)
    assert result("geometric_median", [[1.0], [2.0], [3.0], [7.0], [90.0]])[0].tolist() == pytest.approx(
        [3.0], abs=1e-2
    )
    value, metrics = result("geometric_median", [[2.0, 5.0]] * 4)
    assert value.tolist() == [2.0, 5.0]
    assert metrics["iterations"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_geometric_median_is_where_unit_vectors_to_the_clients_cancel(seed):
    rows = [drawn(100 * seed + k) for k in range(7)]
    value, metrics = result("geometric_median", rows, tolerance=1e-7, iterations=1000)
    pull = sum((flat(r) - value) / (flat(r) - value).norm() for r in rows)
    assert float(pull.norm()) < 1e-4  # the mean of these has 0.3
    assert metrics["iterations"] < 1000
    loose, few = result("geometric_median", rows, tolerance=1e-2)
    assert few["iterations"] < metrics["iterations"]
    assert float((loose - value).norm()) < 0.05 * float(torch.stack([(flat(r) - value).norm() for r in rows]).mean())


def test_norm_bound_by_hand():
    start = {"b": torch.tensor([1.0, 1.0])}
    rows = [[4.0, 5.0], [1.0, 2.0], [1.0, 1.0]]  # 5, 1 and 0 away
    value, metrics = result("norm_bound", rows, start, bound=2.0)
    assert value.tolist() == pytest.approx([1 + (3 / 5 * 2) / 3, 1 + (4 / 5 * 2 + 1) / 3])
    assert (metrics["clipped"], metrics["median_distance"]) == (1, 1.0)
    value, metrics = result("norm_bound", rows, start, bound=5.0)  # at the bound nothing is changed
    assert value.tolist() == pytest.approx([2.0, 8 / 3])
    assert metrics["clipped"] == 0


def test_norm_bound_clips_the_distance_of_the_whole_adapter_not_of_each_tensor():
    start, away = drawn(1), {n: t + 3.0 for n, t in drawn(1).items()}
    value, _ = result("norm_bound", [away], start, bound=1.0)
    assert float((value - flat(start)).norm()) == pytest.approx(1.0, rel=1e-5)


def test_rules_by_coordinate_do_not_depend_on_the_blocks_that_they_work_in(monkeypatch):
    rows = [drawn(k) for k in range(5)]
    whole = {name: result(name, rows, **o)[0] for name, o in SETTINGS if "keep" not in o}
    monkeypatch.setattr(robust, "COLUMNS", 4)
    for name, options in SETTINGS:
        if "keep" not in options:
            assert torch.allclose(result(name, rows, **options)[0], whole[name], rtol=1e-6), name


# ------------------------------------------------------------------ what every rule must hold


CENTRE = drawn(7)  # where honest clients are headed; the broadcast is a little short of it
HONEST = [{n: t + 0.1 * drawn(50 + k)[n] for n, t in CENTRE.items()} for k in range(9)]
BROADCAST = {n: t - 0.02 for n, t in CENTRE.items()}
ATTACKS = {
    "huge": lambda theta: {n: 1e6 * t for n, t in theta.items()},
    "sign flip": lambda theta: {n: -t for n, t in theta.items()},
    "update flipped": lambda theta: {n: 2 * BROADCAST[n] - 5 * (t - BROADCAST[n]) for n, t in theta.items()},
    "noise": lambda theta: {n: t + 1e3 * drawn(99)[n] for n, t in theta.items()},
    "zeros": lambda theta: {n: torch.zeros_like(t) for n, t in theta.items()},
}
SPREAD = max(float((flat(a) - flat(b)).norm()) for a, b in combinations(HONEST, 2))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("name", "options"), SETTINGS)
@pytest.mark.parametrize("place", [0, 9])
def test_one_hostile_client_moves_the_result_by_less_than_the_honest_spread(name, options, attack, place):
    clean, _ = result(name, HONEST, BROADCAST, **options)
    hostile = ATTACKS[attack](HONEST[3])
    attacked, _ = result(name, [*HONEST[:place], hostile, *HONEST[place:]], BROADCAST, **options)
    assert float((attacked - clean).norm()) < SPREAD


@pytest.mark.parametrize("attack", ["huge", "noise"])
def test_fedavg_is_moved_by_more(attack):
    clean, _ = result("fedavg", HONEST, BROADCAST)
    attacked, _ = result("fedavg", [*HONEST, ATTACKS[attack](HONEST[3])], BROADCAST)
    assert float((attacked - clean).norm()) > 10 * SPREAD


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_nan_is_refused_before_it_is_aggregated(name, options):
    algorithm = server(name, BROADCAST, **options)
    spoiled = {**HONEST[0], "b": torch.tensor([0.0, 0.0, float("nan"), 0.0, 0.0])}
    with pytest.raises(ValueError, match="b has numbers that are not finite"):
        algorithm.accept(update("x", spoiled))
    algorithm.accept(update("x", HONEST[0]))


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_a_client_that_claims_more_examples_has_no_louder_voice(name, options):
    ends = []
    for claimed in (1, 10**9):
        algorithm = server(name, BROADCAST, **options)
        algorithm.aggregate(update(f"c{i}", t, claimed if i == 4 else 1) for i, t in enumerate(HONEST))
        ends.append(algorithm.shared.sha256())
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_the_order_in_which_clients_are_listed_does_not_matter(name, options):
    rows = HONEST[:4]
    for count in (2, 3, 4):
        expected, _ = result(name, rows[:count], BROADCAST, **options)
        for order in permutations(rows[:count]):
            assert torch.allclose(result(name, list(order), BROADCAST, **options)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_one_client_alone_is_its_own_aggregate_bit_for_bit(name):
    options = {"bound": 1e30} if name == "norm_bound" else {}
    value, _ = result(name, [HONEST[0]], BROADCAST, **options)
    assert torch.equal(value, flat(HONEST[0]))


@pytest.mark.parametrize("name", RULES)
def test_no_update_at_all_is_an_error(name):
    with pytest.raises(ValueError, match="no updates"):
        server(name, BROADCAST).aggregate(iter([]))


def test_a_rule_holds_copies_since_a_stream_may_reuse_its_buffers():
    buffer = {n: t.clone() for n, t in HONEST[0].items()}

    def reusing():
        for i, row in enumerate(HONEST):
            for n, t in row.items():
                buffer[n].copy_(t)
            yield update(f"c{i}", buffer)

    for name in RULES[:4]:
        algorithm = server(name, BROADCAST)
        algorithm.aggregate(reusing())
        assert torch.equal(flat(algorithm.shared.tensors()), result(name, HONEST, BROADCAST)[0]), name
