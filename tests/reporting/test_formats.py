"""Numbers as text: one table of values and the exact texts that a reader sees. ␣ stands for a no-break space."""

from __future__ import annotations

import math

import pytest

from fedloom.reporting import formats

TEXTS = [
    ("loss", 0, "0.000"),
    ("loss", 1.23449, "1.234"),
    ("loss", 1.23451, "1.235"),
    ("loss", -0.5, "-0.500"),
    ("percent", 0, "0.0␣%"),
    ("percent", 1, "100.0␣%"),
    ("percent", 0.62549, "62.5␣%"),
    ("percent", 0.6256, "62.6␣%"),
    ("points", 0.125, "+12.5␣points"),
    ("points", -0.125, "−12.5␣points"),
    ("points", 0, "+0.0␣points"),
    ("change", 0.0126, "+0.013"),
    ("change", -1.5, "−1.500"),
    ("count", 0, "0"),
    ("count", 999, "999"),
    ("count", 1234567, "1,234,567"),
    ("count", -1234, "-1,234"),
    ("size", 0, "0␣B"),
    ("size", 1, "1␣B"),
    ("size", 999, "999␣B"),
    ("size", 999.4, "999␣B"),
    ("size", 999.6, "1.0␣kB"),
    ("size", 1000, "1.0␣kB"),
    ("size", 1049, "1.0␣kB"),
    ("size", 1051, "1.1␣kB"),
    ("size", 48_200_000, "48.2␣MB"),
    ("size", 999_940, "999.9␣kB"),
    ("size", 999_960, "1.0␣MB"),
    ("size", 1e9, "1.0␣GB"),
    ("size", 1e12, "1.0␣TB"),
    ("size", 1e15, "1.0␣PB"),
    ("size", 1e19, "10000.0␣PB"),
    ("size", -1500, "-1.5␣kB"),
    ("short", 0, "0"),
    ("short", 999, "999"),
    ("short", 1_200_000, "1.2␣M"),
    ("short", 1500, "1.5␣k"),
    ("short", 1e10, "10.0␣G"),
    ("short", 1e18, "1.0␣E"),
    ("short", 1e22, "10000.0␣E"),
    ("digits", 0, "0"),
    ("digits", 6.5749, "6.57"),
    ("digits", 0.012345, "0.0123"),
    ("digits", 1234, "1.23e+03"),
    ("duration", 0, "0.0␣s"),
    ("duration", 0.04, "0.0␣s"),
    ("duration", 59.94, "59.9␣s"),
    ("duration", 59.96, "1␣min 0␣s"),
    ("duration", 60, "1␣min 0␣s"),
    ("duration", 192.4, "3␣min 12␣s"),
    ("duration", 3599.4, "59␣min 59␣s"),
    ("duration", 3599.6, "1␣h 0␣min"),
    ("duration", 3600, "1␣h 0␣min"),
    ("duration", 3659, "1␣h 0␣min"),
    ("duration", 7260, "2␣h 1␣min"),
    ("duration", 86_400, "24␣h 0␣min"),
    ("duration", 3 * 86_400 + 7260, "74␣h 1␣min"),
]


@pytest.mark.parametrize(("kind", "value", "expected"), TEXTS)
def test_each_format_writes_this_text(kind, value, expected):
    assert formats.text(value, kind) == expected.replace("␣", "\u00a0")


def test_every_format_is_in_the_table():
    assert {kind for kind, *_ in TEXTS} == set(formats.FORMATS)


@pytest.mark.parametrize("kind", formats.FORMATS)
@pytest.mark.parametrize("value", [None, "12", True, False, [], {}])
def test_what_is_no_number_is_a_dash(kind, value):
    assert formats.text(value, kind) == "–"
    assert formats.data(value, kind) == '<span class="none" title="not measured">–</span>'


def test_the_exact_value_stands_beside_the_rounded_one():
    assert formats.data(48_231_234, "size") == '<data value="48231234">48.2\u00a0MB</data>'
    assert formats.data(0, "percent") == '<data value="0">0.0\u00a0%</data>'
    assert formats.data(-0.25, "change") == '<data value="-0.25">−0.250</data>'
    assert formats.data(math.pi, "digits") == f'<data value="{math.pi}">3.14</data>'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2026-03-01T09:05:59+00:00", "1 March 2026, 09:05 UTC"),
        ("2026-12-31T23:30:00-02:00", "1 January 2027, 01:30 UTC"),
        ("2026-03-11T09:05", "11 March 2026, 09:05"),
        ("yesterday", "yesterday"),
        (None, "None"),
    ],
)
def test_a_moment_is_written_in_utc(value, expected):
    assert formats.moment(value) == expected
