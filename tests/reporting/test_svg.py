"""Axes of a chart whose values are all but the same, as after one round of one client."""

from __future__ import annotations

import pytest

from fedloom.reporting.svg import nice_ticks, tick_labels


@pytest.mark.parametrize("value", [0.0, 3.725526798654, -2.0, 1e-3, 1e9])
@pytest.mark.parametrize("apart", [0.0, 1e-16, 1e-13])
def test_values_that_differ_by_rounding_alone_still_have_an_axis(value, apart):
    ticks = nice_ticks(value, value + apart * abs(value))
    assert ticks[0] < ticks[-1]
    assert ticks[0] <= value <= ticks[-1]
    assert len(set(tick_labels(ticks, ""))) == len(ticks)
