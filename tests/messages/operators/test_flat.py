"""Flat parts and their table: where each tensor lies, and what a table from outside may not claim."""

from __future__ import annotations

import pytest
import torch

from fedloom.messages import limits
from fedloom.messages.operators.flat import BadPayload, Part, Table, bits, check_parts, flatten, raw_bytes, unflatten

TENSORS = {
    "b": torch.tensor([10.0, 11.0]),
    "a.weight": torch.arange(6.0).reshape(2, 3).T,
    "one": torch.tensor(5.0),
    "none": torch.zeros(0, 4),
    "seeds": torch.tensor([7, 8]),
}
ROWS = {"F32": [["a.weight", [3, 2]], ["b", [2]], ["none", [0, 4]], ["one", []]], "I64": [["seeds", [2]]]}


def test_tensors_lie_in_sorted_order_without_gaps():
    table = Table.of(TENSORS)
    assert table.to_json() == ROWS and list(table.to_json()) == ["F32", "I64"]
    assert list(table.places()) == [
        ("F32", "a.weight", 0, (3, 2)), ("F32", "b", 6, (2,)), ("F32", "none", 8, (0, 4)), ("F32", "one", 8, ()),
        ("I64", "seeds", 0, (2,)),
    ]  # fmt: skip
    assert table.spec() == {"F32": Part(torch.float32, 9), "I64": Part(torch.int64, 2)}
    assert table.nbytes == 9 * 4 + 2 * 8
    parts = flatten(TENSORS, table)
    assert parts["F32"].tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 10.0, 11.0, 5.0]
    assert parts["I64"].tolist() == [7, 8]


def test_what_comes_back_is_sorted_and_has_memory_of_its_own():
    table = Table.of(TENSORS)
    parts = flatten(TENSORS, table)
    made = unflatten(parts, table)
    assert list(made) == sorted(TENSORS)
    assert all(torch.equal(made[n], t) and made[n].dtype == t.dtype for n, t in TENSORS.items())
    parts["F32"].zero_()
    assert made["b"].tolist() == [10.0, 11.0]
    assert {t.storage_offset() for t in made.values()} == {0}
    assert flatten({}, Table.of({})) == unflatten({}, Table.of({})) == {}


def test_a_type_that_does_not_travel_is_refused():
    with pytest.raises(ValueError, match=r"w has the dtype torch\.complex128, which messages do not support"):
        Table.of({"w": torch.zeros(1, dtype=torch.complex128)})


def test_a_table_from_outside_is_the_same_table():
    assert Table.from_json(ROWS) == Table.of(TENSORS)
    assert Table.from_json({}) == Table.of({})


LARGEST = limits.PAYLOAD_BYTES


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (None, "no mapping of dtypes to lists"),
        ([], "no mapping of dtypes to lists"),
        ({"F32": {}}, "no mapping of dtypes to lists"),
        ({"F32": [], "I64": None}, "no mapping of dtypes to lists"),
        ({"F33": [["a", [1]]]}, "the unknown dtype .F33."),
        ({"F32": [("a", [1])]}, "no.* row of the table|is not .name, shape"),
        ({"F32": [["a"]]}, "is not .name, shape"),
        ({"F32": [["a", [1], 0]]}, "is not .name, shape"),
        ({"F32": [[1, [1]]]}, "is not .name, shape"),
        ({"F32": [["a", 1]]}, "is not .name, shape"),
        ({"F32": [["n" * (limits.NAME_CHARACTERS + 1), [1]]]}, "is not .name, shape"),
        ({"F32": [["a", [1]], ["a", [1]]]}, "names 'a' twice"),
        ({"F32": [["a", [1]]], "I64": [["a", [1]]]}, "names 'a' twice"),
        ({"F32": [["b", [1]], ["a", [1]]]}, "not in sorted order"),
        ({"I64": [["a", [1]]], "F32": [["b", [1]]]}, "not in sorted order"),
        ({"F32": [["a", [1] * (limits.DIMENSIONS + 1)]]}, "must have at most 16 sizes"),
        ({"F32": [["a", [-1]]]}, "must have at most 16 sizes, each 0 or more"),
        ({"F32": [["a", [-2, -3]]]}, "must have at most 16 sizes, each 0 or more"),
        ({"F32": [["a", [1.0]]]}, "must have at most 16 sizes"),
        ({"F32": [["a", [True]]]}, "must have at most 16 sizes"),
        ({"U8": [["a", [LARGEST + 1]]]}, "must have at most 16 sizes"),
        ({"U8": [["a", [2, LARGEST // 2 + 1]]]}, "larger than the largest payload"),
        ({"U8": [["a", [0, LARGEST, 2]]]}, "larger than the largest payload"),
        ({"U8": [["a", [LARGEST]], ["b", [1]]]}, f"claims {LARGEST + 1} bytes, but at most {LARGEST} are allowed"),
        ({"F64": [["a", [LARGEST // 8 + 1]]]}, "at most .* are allowed"),
    ],
    ids=str,
)
def test_a_table_that_cannot_be_is_refused(values, sentence):
    with pytest.raises(BadPayload, match=sentence):
        Table.from_json(values)


def test_the_largest_table_that_may_be():
    for values in (
        {"U8": [["a", [LARGEST]]]}, {"F64": [["a", [LARGEST // 8]]]}, {"U8": [["a", [0, LARGEST]], ["b", [LARGEST]]]},
        {"U8": [["n" * limits.NAME_CHARACTERS, [1] * limits.DIMENSIONS]]},
    ):  # fmt: skip
        assert Table.from_json(values).to_json() == values


def test_no_table_has_more_tensors_than_may_travel(monkeypatch):
    monkeypatch.setattr(limits, "TENSORS", 3)
    rows = {"F32": [["a", [1]], ["b", [1]]], "I64": [["c", [1]], ["d", [1]]]}
    with pytest.raises(BadPayload, match="names more than 3 tensors"):
        Table.from_json(rows)
    assert Table.from_json({**rows, "I64": rows["I64"][:1]})


def test_parts_have_to_be_what_the_chain_makes():
    spec = {"x": Part(torch.float32, 3), "y": Part(torch.uint8, 4, bound=True)}
    good = {"x": torch.zeros(3), "y": torch.zeros(4, dtype=torch.uint8)}
    check_parts(good, spec)
    check_parts({**good, "y": good["y"][:0]}, spec)
    for bad in (
        {"x": good["x"]}, {**good, "z": good["x"]}, {**good, "x": torch.zeros(2)}, {**good, "x": torch.zeros(4)},
        {**good, "x": torch.zeros(3, 1)}, {**good, "x": torch.zeros(3, dtype=torch.int32)},
        {**good, "y": torch.zeros(5, dtype=torch.uint8)}, {**good, "y": torch.zeros(2, 2, dtype=torch.uint8)},
    ):  # fmt: skip
        with pytest.raises(BadPayload, match=r"but the chain gives"):
            check_parts(bad, spec)
    with pytest.raises(BadPayload, match="part y has 5 of U8, but the chain gives at most 4 of U8"):
        check_parts({**good, "y": torch.zeros(5, dtype=torch.uint8)}, spec)
    assert (Part(torch.float64, 3).nbytes, Part(torch.bool, 3).nbytes) == (24, 3)


def test_bits_are_a_window_where_they_can_be():
    plain = torch.tensor([1.0, -0.0])
    assert bits(plain).tolist() == [0, 0, 128, 63, 0, 0, 0, 128]
    plain[1] = 1.0
    assert bits(plain).data_ptr() == plain.data_ptr()
    assert bits(torch.arange(6.0).reshape(2, 3).T).view(torch.float32).tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    one = torch.arange(12.0).as_strided((1,), (7,), 5)  # one element with a stride
    assert bits(one).view(torch.float32).tolist() == [5.0]
    assert bits(torch.arange(12, dtype=torch.int16)[::5]).view(torch.int16).tolist() == [0, 5, 10]
    assert bits(torch.zeros(0, 3)).numel() == 0
    assert bytes(raw_bytes(torch.tensor([258], dtype=torch.int16))) == b"\x02\x01"
