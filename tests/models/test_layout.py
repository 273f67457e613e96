"""One flat buffer: where tensors lie, what is refused, and means that are exact and the same in any order."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.models.layout import (
    ADD_BLOCK,
    SUM_BLOCK,
    Adapter,
    Layout,
    WeightedMean,
    block_sum,
    check_names,
    joint_window,
)

SHAPES = {"b.weight": (2, 3), "a.weight": (4,), "c": ()}


def filled(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=draw) for n, shape in SHAPES.items()}


def test_layout_is_in_name_order_whatever_order_it_was_given():
    layout = Layout(SHAPES)
    assert layout.names == ("a.weight", "b.weight", "c")
    assert layout.offsets == {"a.weight": 0, "b.weight": 4, "c": 10}
    assert layout.numel == 11
    assert layout == Layout(dict(reversed(SHAPES.items())))
    assert hash(layout) == hash(Layout(dict(reversed(SHAPES.items()))))
    assert layout != Layout({**SHAPES, "c": (1,)})


def test_views_are_windows_into_the_flat_buffer():
    adapter = Adapter.of(filled(0))
    for name, tensor in filled(0).items():
        assert torch.equal(adapter.views[name], tensor)
        assert adapter.views[name].shape == torch.Size(SHAPES[name])
    adapter.flat[4:10] = torch.arange(6.0)
    assert torch.equal(adapter.views["b.weight"], torch.arange(6.0).view(2, 3))
    adapter.views["c"].fill_(7.0)
    assert adapter.flat[10] == 7.0
    assert adapter.nbytes == 44


def test_tensors_are_matched_by_name_not_by_position():
    swapped = dict(reversed(filled(1).items()))
    assert torch.equal(Adapter.of(swapped).flat, Adapter.of(filled(1)).flat)


def test_a_snapshot_is_not_touched_by_later_training():
    adapter = Adapter.of(filled(0))
    copy = adapter.snapshot()
    adapter.flat.add_(1.0)
    assert torch.equal(copy.flat, Adapter.of(filled(0)).flat)


@pytest.mark.parametrize("refuse", [Adapter(Layout(SHAPES)).load, lambda t: WeightedMean(Layout(SHAPES)).add(t, 1)])
def test_missing_unexpected_and_misshapen_names_are_all_listed(refuse):
    tensors = filled(0)
    del tensors["c"]
    tensors["a.weight"] = torch.zeros(5)
    tensors["d"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing: c; unexpected: d; misshapen: a\.weight") as caught:
        refuse(tensors)
    assert "(5,) instead of (4,)" in str(caught.value)


def test_a_long_list_of_wrong_names_is_cut_and_counted():
    layout = Layout({f"w{i}": (1,) for i in range(9)})
    with pytest.raises(ValueError, match=r"w0, w1, w2, w3, w4 and 4 more"):
        check_names(layout, {})


def test_a_refused_load_leaves_the_adapter_as_it_was():
    adapter = Adapter.of(filled(0))
    with pytest.raises(ValueError, match="missing"):
        adapter.load({"a.weight": torch.zeros(4)})
    assert torch.equal(adapter.flat, Adapter.of(filled(0)).flat)


def test_sha256_is_of_the_tensors_bytes_in_name_order():
    tensors = filled(3)
    by_hand = hashlib.sha256(b"".join(tensors[n].numpy().tobytes() for n in sorted(tensors))).hexdigest()
    assert Adapter.of(tensors).sha256() == by_hand
    assert Adapter.of(dict(reversed(tensors.items()))).sha256() == by_hand
    tensors["c"] = tensors["c"] + 1e-6
    assert Adapter.of(tensors).sha256() != by_hand


def test_weights_of_one_and_three_give_that_mean_exactly():
    mean = WeightedMean(Layout({"w": (2,)}))
    mean.add({"w": torch.tensor([4.0, 0.0])}, 1)
    mean.add({"w": torch.tensor([8.0, 1.0])}, 3)
    assert mean.total == 4
    assert mean.result().tolist() == [7.0, 0.75]
    assert mean.result().dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 10**6)),
        min_size=1,
        max_size=20,
    )
)
def test_the_mean_is_the_rational_mean_rounded_once(pairs):
    mean = WeightedMean(Layout({"w": (1,)}))
    for value, weight in pairs:
        mean.add({"w": torch.tensor([value])}, weight)
    exact = sum(Fraction(v) * w for v, w in pairs) / sum(w for _, w in pairs)
    largest = max(abs(v) for v, _ in pairs)
    subnormal = 2.0**-150  # half the smallest fp32 number: below 1e-38 the rounding is absolute
    assert abs(float(mean.result()) - float(exact)) <= 6e-8 * abs(float(exact)) + 1e-14 * largest + subnormal


def test_the_accumulator_is_fp64():
    """In fp32 the small update would vanish beside the large ones."""
    mean = WeightedMean(Layout({"w": (1,)}))
    for value in (1e8, 1.0, -1e8):
        mean.add({"w": torch.tensor([value])}, 1)
    assert float(mean.result()) == pytest.approx(1 / 3)


def test_updates_of_another_precision_are_averaged_in_full():
    mean = WeightedMean(Layout({"w": (1,)}))
    mean.add({"w": torch.tensor([1.0], dtype=torch.bfloat16)}, 1)
    mean.add({"w": torch.tensor([2.0], dtype=torch.float64)}, 2)
    assert float(mean.result()) == pytest.approx(5 / 3)


@pytest.mark.parametrize("weight", [0, -1])
def test_an_update_without_examples_has_no_weight(weight):
    with pytest.raises(ValueError, match="must be at least 1"):
        WeightedMean(Layout({"w": (1,)})).add({"w": torch.ones(1)}, weight)


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no updates"):
        WeightedMean(Layout({"w": (1,)})).result()


@pytest.mark.parametrize("size", [0, 1, SUM_BLOCK, SUM_BLOCK + 1, 3 * SUM_BLOCK + 17, 2_000_003])
def test_block_sum_is_the_sum_whatever_the_number_of_threads(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    seen = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        seen.add(block_sum(values).item())
    assert len(seen) == 1
    assert seen.pop() == pytest.approx(values.double().sum().item(), abs=1e-2)


def test_block_sum_adds_block_by_block():
    values = torch.randn(3 * SUM_BLOCK + 5, generator=torch.Generator().manual_seed(1))
    blocks = [values[i : i + SUM_BLOCK].sum() for i in range(0, len(values), SUM_BLOCK)]
    assert block_sum(values) == torch.stack(blocks).sum()
    assert np.isfinite(float(block_sum(values)))


# ------------------------------------------------------------------ one window


def test_adding_over_one_window_and_tensor_by_tensor_are_the_same_bits():
    layout = Layout({"a": (3, 5), "b": (ADD_BLOCK + 17,), "c": ()})
    apart, together = WeightedMean(layout), WeightedMean(layout)
    for k in range(1, 4):
        flat = torch.randn(layout.numel, generator=torch.Generator().manual_seed(k)) * 10.0 ** (5 * k)
        windows = layout.views(flat)
        copies = {n: t.clone() for n, t in windows.items()}
        assert joint_window(list(windows.values())) is not None and joint_window(list(copies.values())) is None
        together.add(dict(reversed(windows.items())), 3 * k, 0.5)
        apart.add(copies, 3 * k, 0.5)
    assert torch.equal(apart.result(torch.float64), together.result(torch.float64))


def test_one_window_is_made_of_neighbours_alone():
    flat = torch.arange(24.0)
    a, b, c = flat[:6].view(2, 3), flat[6:8], flat[8:]
    assert torch.equal(joint_window([a, b, c]), flat) and torch.equal(joint_window([b, c]), flat[6:])
    assert joint_window([]) is None
    assert joint_window([a, c]) is None and joint_window([b, a]) is None and joint_window([a, a]) is None
    assert joint_window([a.t(), b]) is None and joint_window([flat[::2]]) is None
    assert joint_window([a, flat[6:8].view(torch.int32)]) is None
    other = torch.empty(4)
    assert joint_window([flat[20:], other]) is None  # two memories, wherever they lie
