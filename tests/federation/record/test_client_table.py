"""What each client measured: named in the event up to two hundred, in a file with a spread beyond."""

from __future__ import annotations

import pytest

from fedloom.federation.record.client_table import MANY, ClientTable, quantile, spread


def clients(count: int) -> dict[str, dict[str, float | int | None]]:
    return {f"c,{i}": {"loss": i / 3, "tokens": 10 * i, "score": None, "questions": 0} for i in range(count)}


def test_up_to_two_hundred_are_named(tmp_path):
    tables = ClientTable(tmp_path / "evaluations")
    told = tables.told(3, clients(MANY))
    assert MANY == 200 and told == {"clients": clients(MANY), "spread": None}
    assert not (tmp_path / "evaluations").exists()
    assert tables.clients(3, told) == clients(MANY)


def test_more_are_a_file_that_comes_back_to_the_last_bit(tmp_path):
    tables = ClientTable(tmp_path / "evaluations")
    many = clients(MANY + 1)
    many["c,7"] = {"loss": None, "tokens": 0, "score": 0.1 + 0.2, "questions": 3}
    told = tables.told(12, many)
    assert told["clients"] == {} and told["spread"] == spread(many)
    assert tables.path(12) == tmp_path / "evaluations" / "round-0012.csv"
    assert tables.path(12).read_text().splitlines()[:2] == ["client,loss,tokens,score,questions", '"c,0",0.0,0,,0']
    back = tables.clients(12, told)
    assert back == many
    assert [type(v) for v in back["c,7"].values()] == [type(None), int, float, int]


def test_a_spread_has_five_numbers_of_those_that_have_one():
    few = {
        str(i): {"loss": value, "tokens": 1, "score": None, "questions": 0}
        for i, value in enumerate((4.0, None, 1.0, 2.0))
    }
    assert spread(few) == {
        "clients": 4,
        "loss": {"lowest": 1.0, "lower_quartile": 1.5, "median": 2.0, "upper_quartile": 3.0, "highest": 4.0},
        "score": None,
    }


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5.0], 0.75, 5.0),
        ([1.0, 3.0], 0.5, 2.0),
        ([1.0, 3.0], 1.0, 3.0),
        ([1.0, 3.0], 0.25, 1.5),
        ([0.0, 1.0, 10.0], 0.75, 5.5),
    ],
)
def test_quantiles_are_interpolated(values, share, expected):
    assert quantile(values, share) == expected
