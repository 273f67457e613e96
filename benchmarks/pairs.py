"""How the benchmarks compare two pieces of work that differ by little: CPU seconds, in pairs that change their order.

A shared machine is slow for seconds at a time and quick again, so what is compared has to run next to each other, and a
ratio is the median of the pairs' ratios. Two identical pieces of work (A/A) show what the method makes of no difference.
It is imported by the other scripts.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Work = Callable[[], object]


def cpu(work: Work) -> float:
    """CPU seconds of this process, all threads together."""
    started = time.process_time()
    work()
    return time.process_time() - started


def in_turn(works: Mapping[str, Work], turns: int, warm: bool = True) -> dict[str, list[float]]:
    """CPU seconds of each work in each turn; every other turn goes the other way round (A B C, C B A, …)."""
    if warm:
        for work in works.values():
            work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns):
        for name in list(works) if turn % 2 == 0 else list(reversed(works)):
            found[name].append(cpu(works[name]))
    return found


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of the pairs' ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def spread(one: Sequence[float], other: Sequence[float]) -> float:
    """The standard error of `ratio`: that of a median of as many normal numbers with the middle half's width."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    lower, _, upper = statistics.quantiles(ratios, n=4)
    return 1.2533 * (upper - lower) / 1.349 / math.sqrt(len(ratios))


def load() -> str:
    """A line about who else is at work: a number that was measured under load says so."""
    return f"load={os.getloadavg()[0]:.1f} cores={len(os.sched_getaffinity(0))}"
