"""What a benchmark states at its end: one number of a point over that of another, as it declares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedloom.experiment.benchmark.declaration import Benchmark
from fedloom.experiment.benchmark.table import Row


def ratios(benchmark: Benchmark, found: Sequence[Row]) -> dict[str, float | None]:
    """Name → ratio, None where a run of either point is missing.

    With more axes than the one of the two points there is a ratio for each combination of the others, which stands
    behind its name: `name.point`.
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
    """Those that are there, as `name=number`."""
    return [f"{name}={value:.4f}" for name, value in made.items() if value is not None]
