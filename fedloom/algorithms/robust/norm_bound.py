"""Norm bounding: no client moves the mean by more than a bound, whatever it sends.

Sun et al., "Can You Really Backdoor Federated Learning?", arXiv 1911.07963, section 5: with Δ_k = θ_k − θ_t,
θ_{t+1} = θ_t + 1/n Σ_k Δ_k · min(1, M / ‖Δ_k‖). A hostile client of n changes the result by at most 2M/n. All
clients have the same weight (see coordinatewise.py). Updates are read one at a time. The whole adapter travels, both ways.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import ClassVar

from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.robust.krum import distance
from fedloom.messages.types import Update
from fedloom.models.layout import Adapter, WeightedMean


class NormBound(base.Algorithm):
    properties: ClassVar = base.Properties(neutral={"bound": 1e30})
    about: ClassVar = About("robust", "adapter, both ways", "Sun et al. 2019, arXiv 1911.07963")

    class Options(base.AlgorithmOptions):
        bound: float = Field(
            5.0,
            gt=0,
            description="M: the largest distance of a client's adapter from the broadcast (Euclidean norm over the whole "
            "adapter); set it from the clients' median distance, which each round logs",
        )

    options: Options

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        mean = WeightedMean(self.shared.layout)
        distances = []
        for update in updates:
            theirs = Adapter.of(update.payload.tensors)
            distances.append(distance(theirs.flat, self.shared.flat))
            if distances[-1] > self.options.bound:
                here = self.shared.flat.double()
                within = here + (theirs.flat.double() - here) * (self.options.bound / distances[-1])
                mean.add(self.shared.layout.views(within), 1)
            else:
                mean.add(theirs.tensors(), 1)
        result = mean.result()
        moved = float((result - self.shared.flat).norm())
        self.shared.copy_(result)
        clipped = sum(d > self.options.bound for d in distances)
        return {"distance_moved": moved, "clipped": clipped, "median_distance": statistics.median(distances)}
