"""Random directions that everybody can draw, and weights that are a sum of them: w = w₀ − Σ_i a_i z_i.

z is standard normal and depends only on the run's seed and the direction's numbers. A CPU generator draws it in blocks of
a fixed size, each with its own seed. So any part of it can be drawn at any time, with the same bits (on one kind of CPU:
torch's normal numbers may differ in the last bit between instruction sets).

The sum is kept in fixed point, because the sum of whole numbers does not depend on their order. So a client that missed
rounds, one that replays from the start and one that follows every round get the same bits. Changing one a_i costs one
z_i.
This file does not know how the a_i are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from fedloom.common.randomness import torch_generator

#: Elements that are drawn from one seed.
BLOCK = 16_384


#: One unit of the fixed-point sum is 2⁻⁴⁰, far below the last bit of a float32 weight of ordinary size.
UNITS = 2.0**40


#: A larger coefficient means that the run diverged. Sums of smaller ones fit into 64 bits.
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
        """Yield (slice of the buffer, its float32 numbers), block by block."""
        stop = self.blocks if direction.stop is None else direction.stop
        for index in range(direction.start, stop):
            where = slice(index * BLOCK, min((index + 1) * BLOCK, self.numel))
            generator = torch_generator(self.seed, "directions", direction.round, f"{direction.number}/{index}")
            yield (
                where,
                torch.randn(BLOCK, generator=generator)[: where.stop - where.start],
            )  # the last block is drawn in full and cut

    def dense(self, direction: Direction) -> torch.Tensor:
        """Return the numbers of all blocks of the direction: [its elements], float32, on the CPU."""
        return torch.cat([z for _, z in self.pieces(direction)])


class Replay:
    """Computes w₀ − Σ a z; between two calls it draws only the directions whose coefficient changed.

    Args:
        start: w₀, [numel] float32.
    """

    def __init__(self, directions: Directions, start: torch.Tensor) -> None:
        self._directions = directions
        self._start = start.detach().cpu()
        self._sum = torch.zeros(directions.numel, dtype=torch.int64)
        self._held: dict[Direction, float] = {}

    def at(self, coefficients: Mapping[Direction, float]) -> torch.Tensor:
        """Return the weights: [numel], float32. Coefficients are float32, at most LARGEST in size; a missing one is 0."""
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
    """Return a·z in whole units. The product of two float32 numbers is exact in float64, and is rounded once."""
    return z.double().mul_(coefficient * UNITS).round_().long()


def check_coefficients(values: torch.Tensor) -> None:
    """Raise ValueError unless `values` is a list of float32 numbers, each at most LARGEST in size."""
    if values.dtype != torch.float32 or values.ndim != 1:
        raise ValueError(f"coefficients are {values.dtype} {tuple(values.shape)}, not a list of float32 numbers")
    if values.numel() and not float(values.abs().max()) <= LARGEST:
        raise ValueError(f"a coefficient is larger than {LARGEST:g} or not finite: lower train.lr")
