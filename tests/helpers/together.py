"""Ranks as threads of this process: the same sums without processes, for tests of what is summed and not of how."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fedloom.training.parallel import Ranks


@dataclass
class Meeting:
    """What the ranks share. `sizes`: how many numbers each sum had, as rank 0 saw it."""

    count: int
    sharded: bool = False
    sizes: list[int] = field(default_factory=list)
    held: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Everybody's values, in the order of ranks."""
        self.held[rank] = value
        self.barrier.wait()
        values = [self.held[r] for r in range(self.count)]
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class Threaded(Ranks):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum_(self, tensor):
        if self.first:
            self.meeting.sizes.append(tensor.numel())
        tensor.copy_(torch.stack(self.meeting.exchange(self.rank, tensor.clone())).sum(0))

    def total(self, value):
        return sum(self.meeting.exchange(self.rank, value))

    def counts(self, *values):
        return [sum(column) for column in zip(*self.meeting.exchange(self.rank, values), strict=True)]

    def check_alike(self, flat):
        everybody = self.meeting.exchange(self.rank, flat.clone())
        assert all(torch.equal(everybody[0], other) for other in everybody)


def together(work: Callable[[Ranks], Any], meeting: Meeting) -> list[Any]:
    """What `work` gives on each rank, all at once. Raises what any of them raised."""
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threaded(rank, meeting.count, meeting.sharded, "cpu", meeting))
        except BaseException as error:
            results[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(r,)) for r in range(meeting.count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [r for r in results.values() if isinstance(r, BaseException)]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [results[r] for r in range(meeting.count)]
