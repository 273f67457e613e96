"""Compute the ratios that a benchmark declares: a number of one point divided by that of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedloom.experiment.benchmark.declaration import Benchmark
from fedloom.experiment.benchmark.table import Row


def ratios(benchmark: Benchmark, found: Sequence[Row]) -> dict[str, float | None]:
    """Compute name → ratio; None where a run of either point is missing.

    With more axes than one, there is a ratio for each combination of the other axes' points, named `name.point`.
    """
    made: dict[str, float | None] = {}
    for name, ratio in benchmark.ratios.items():
        axis = benchmark.axis_of(name, ratio)
        numbers = {tuple(row.place.items()): None if row.trouble else row.means[ratio.column] for row in found}
        for row in found:
            if row.place[axis] != ratio.over[0]:
                continue
            others = [point for other, point in row.place.items() if other != axis]
            below = numbers.get(tuple({**row.place, axis: ratio.over[1]}.items()))
            above = numbers[tuple(row.place.items())]
            made[".".join([name, *others])] = above / below if above is not None and below else None
    return made


def lines(made: Mapping[str, float | None]) -> list[str]:
    """Write the ratios that exist as `name=number`."""
    return [f"{name}={value:.4f}" for name, value in made.items() if value is not None]
