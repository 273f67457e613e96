"""The algorithms, one file each, and the interface for your own algorithm (docs/extending.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.algorithms.about import About as About
    from fedloom.algorithms.about import Sizes as Sizes
    from fedloom.algorithms.about import nothing as nothing
    from fedloom.algorithms.about import whole as whole
    from fedloom.algorithms.averaging.fedavg import FedAvg as FedAvg
    from fedloom.algorithms.base import ANY_PARALLEL as ANY_PARALLEL
    from fedloom.algorithms.base import Algorithm as Algorithm
    from fedloom.algorithms.base import AlgorithmOptions as AlgorithmOptions
    from fedloom.algorithms.base import Deployed as Deployed
    from fedloom.algorithms.base import Properties as Properties

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "ANY_PARALLEL": "fedloom.algorithms.base",
        "About": "fedloom.algorithms.about",
        "Algorithm": "fedloom.algorithms.base",
        "AlgorithmOptions": "fedloom.algorithms.base",
        "Deployed": "fedloom.algorithms.base",
        "FedAvg": "fedloom.algorithms.averaging.fedavg",
        "Properties": "fedloom.algorithms.base",
        "Sizes": "fedloom.algorithms.about",
        "nothing": "fedloom.algorithms.about",
        "whole": "fedloom.algorithms.about",
    },
)
