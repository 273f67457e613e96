"""What an algorithm promises, checked for a class of your own: `check_algorithm(MyAlgorithm)` (docs/extending.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.testing.contract import ContractBroken as ContractBroken
    from fedloom.testing.contract import Report as Report
    from fedloom.testing.contract import check_algorithm as check_algorithm

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "ContractBroken": "fedloom.testing.contract",
        "Report": "fedloom.testing.contract",
        "check_algorithm": "fedloom.testing.contract",
    },
)
