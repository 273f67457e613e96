"""Random directions that need not travel, and weights that are a sum of them: w = w₀ − Σ_i a_i z_i.

z is standard normal and follows from the run's seed and the direction's numbers alone. It is drawn by a CPU generator in
blocks of a fixed size, each with a seed of its own, so that any part of it can be drawn anywhere, any time, with the
same bits (on one kind of CPU: torch's normal numbers may differ in the last bit between instruction sets).

The sum is kept in fixed point. Whole numbers add up to the same whatever the order, so a client that was away, one that
replays from the start and one that follows every round end with the same bits, and changing one a_i costs one z_i.
This file does not know how the a_i are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from fedloom.common.randomness import torch_generator

#: Elements that are drawn from one seed.
BLOCK = 16_384


#: One unit of the fixed-point sum is 2⁻⁴⁰, far below the last bit of a float32 weight of any size that matters.
UNITS = 2.0**40


#: Coefficients above this are a run that diverged; sums of those below stay inside 64 bits.
LARGEST = 4096.0


class Direction(NamedTuple):
    """The `number`-th direction of `round` (0: of a pool for all rounds), in the buffer's blocks `start` … `stop`."""

    round: int
    number: int
    start: int = 0
    stop: int | None = None


class Directions:
    """The directions of one run over a flat buffer of `numel` elements."""

    def __init__(self, seed: int, numel: int) -> None:
        self.seed = seed
        self.numel = numel
        self.blocks = -(-numel // BLOCK)

    def pieces(self, direction: Direction) -> Iterator[tuple[slice, torch.Tensor]]:
        """(where in the buffer, the numbers there, float32), block by block."""
        stop = self.blocks if direction.stop is None else direction.stop
        for index in range(direction.start, stop):
            where = slice(index * BLOCK, min((index + 1) * BLOCK, self.numel))
            generator = torch_generator(self.seed, "directions", direction.round, f"{direction.number}/{index}")
            yield (
                where,
                torch.randn(BLOCK, generator=generator)[: where.stop - where.start],
            )  # as long a draw at the end

    def dense(self, direction: Direction) -> torch.Tensor:
        """The numbers of all the direction's blocks in one: [its elements], float32, on the CPU."""
        return torch.cat([z for _, z in self.pieces(direction)])


class Replay:
    """w₀ − Σ a z for whatever coefficients it is asked for; from one answer to the next it draws only what changed.

    Args:
        start: w₀, [numel] float32.
    """

    def __init__(self, directions: Directions, start: torch.Tensor) -> None:
        self._directions = directions
        self._start = start.detach().cpu()
        self._sum = torch.zeros(directions.numel, dtype=torch.int64)
        self._held: dict[Direction, float] = {}

    def at(self, coefficients: Mapping[Direction, float]) -> torch.Tensor:
        """[numel], float32. Coefficients are float32 numbers, at most LARGEST in size; a missing one is 0."""
        for direction in {**self._held, **coefficients}:
            old, new = self._held.get(direction, 0.0), coefficients.get(direction, 0.0)
            if old != new:
                for where, z in self._directions.pieces(direction):
                    self._sum[where] += _fixed(new, z)
                    if old:
                        self._sum[where] -= _fixed(old, z)
        self._held = dict(coefficients)
        return (self._start.double() - self._sum.double() / UNITS).float()


def _fixed(coefficient: float, z: torch.Tensor) -> torch.Tensor:
    """a·z in whole units: the product of two float32 numbers is exact in float64, and rounded once."""
    return z.double().mul_(coefficient * UNITS).round_().long()


def check_coefficients(values: torch.Tensor) -> None:
    """Raise ValueError unless `values` is a list of float32 numbers that a sum can take."""
    if values.dtype != torch.float32 or values.ndim != 1:
        raise ValueError(f"coefficients are {values.dtype} {tuple(values.shape)}, not a list of float32 numbers")
    if values.numel() and not float(values.abs().max()) <= LARGEST:
        raise ValueError(f"a coefficient is larger than {LARGEST:g} or not finite: lower train.lr")
