"""Ferret: train as usual, and send the change as coordinates in a random basis that everybody can draw.

Shu et al., "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", arXiv 2409.06277. A client
trains with the recipe's optimiser from w_r to w_rk and sends, of Δ_k = w_r − w_rk, the K coordinates

    a_k = Vᵀ Δ_k / K          unbiased: E[V a_k] = Δ_k, with an error of about √(d/K) · ‖Δ_k‖
    a_k = V⁺ Δ_k              projection: the nearest V a_k, with an error of about √(1 − K/d) · ‖Δ_k‖

and everyone computes w_{r+1} = w_r − η V Σ_k p_k a_k. The buffer is cut into groups of blocks. Each base is in one group,
and d and K above are those of the group (the paper's block-wise reconstruction), so drawing a base costs one group and not
the whole buffer. Two things differ from the paper. Bases are standard normal; the paper's are truncated. All clients of a
round have the same bases; in the paper each client has its own. So the server sends one list of K scalars for any number
of clients.

Traffic: 4·K bytes up, and 4·K bytes down for each round that the client missed, which it replays (history.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import NUMBER, About, Sizes
from fedloom.algorithms.low_traffic.directions import BLOCK, Direction
from fedloom.algorithms.low_traffic.history import Replayed, listed
from fedloom.messages.types import Payload, Update
from fedloom.models.layout import block_sum
from fedloom.training.trainer import FitResult, LocalRun


def _scalars(sizes: Sizes) -> int:
    bases: int = sizes.options.bases
    return NUMBER * bases


class Ferret(Replayed):
    properties: ClassVar = base.Properties(parallel=base.ANY_PARALLEL)
    about: ClassVar = About(
        "low-traffic",
        "scalars of missed rounds",
        "Shu et al. 2024, arXiv 2409.06277",
        up=_scalars,
        down=lambda s: listed(_scalars(s), min(1, s.round - 1)),
        server=lambda s: listed(_scalars(s), s.round),
        client=lambda s: listed(_scalars(s), s.round - 1),
    )

    class Options(base.AlgorithmOptions):
        bases: int = Field(
            2048, ge=1, le=4096, description="K: how many random directions a round's result is written in"
        )
        coordinates: Literal["unbiased", "projection"] = Field(
            "unbiased",
            description="unbiased: right on average, but noisy; projection: the nearest point, but too short",
        )
        server_lr: float = Field(1.0, gt=0, description="η: how far the server goes along the clients' mean")

    options: Options

    def directions(self, round: int, count: int) -> list[Direction]:
        """Give each group bases in proportion to its size: the j-th of K is where the (j + ½)·d/K-th number is."""
        groups = self._groups(count)
        firsts = [first for first, _ in groups]
        blocks = [(2 * number + 1) * self.space.numel // (2 * count) // BLOCK for number in range(count)]
        return [Direction(round, n, *groups[bisect_right(firsts, block) - 1]) for n, block in enumerate(blocks)]

    def _groups(self, bases: int) -> list[tuple[int, int]]:
        """Return (first block, end) of each group: one block, or more so that every group has a few bases.

        An incomplete last block belongs to the last group.
        """
        whole = max(1, self.space.numel // BLOCK)
        groups = max(1, min(whole, bases // 4))
        ends = [(g + 1) * whole // groups for g in range(groups - 1)] + [self.space.blocks]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def accept(self, update: Update) -> None:
        super().accept(update)
        if len(update.payload.tensors["scalars"]) != self.options.bases:
            raise ValueError(f"{len(update.payload.tensors['scalars'])} coordinates for {self.options.bases} bases")

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = self.mean(updates) * self.options.server_lr
        self.history.rounds.append(mean)
        return {"coefficients": len(mean), "largest_coefficient": float(mean.abs().max())}

    def local_training(self, run: LocalRun) -> FitResult:
        start = run.model.adapter.flat.clone()
        result = run.fit(self)
        self._sent = self.coordinates((start - run.model.adapter.flat).cpu())
        return result

    def coordinates(self, delta: torch.Tensor) -> torch.Tensor:
        """Compute a with V a ≈ `delta` in this round's bases: [K] float32."""
        found = torch.zeros(self.options.bases, dtype=torch.float64)
        directions = self.directions(self.round, self.options.bases)
        for first, end in self._groups(self.options.bases):
            part = delta[first * BLOCK : end * BLOCK].double()
            own = [n for n, d in enumerate(directions) if d.start == first]
            if self.options.coordinates == "unbiased":
                dots = [block_sum(self.space.dense(directions[n]).double() * part) for n in own]
                found[own] = torch.stack(dots) / len(own)
            else:
                bases = torch.stack([self.space.dense(directions[n]).double() for n in own], dim=1)
                found[own] = torch.linalg.lstsq(bases, part[:, None], driver="gelsd").solution[:, 0]
        return found.float()

    def shared_state(self) -> Payload:
        return Payload({"scalars": self._sent})
