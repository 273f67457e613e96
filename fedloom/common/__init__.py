"""What every package may use: errors, the registry of names, random generators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.common.errors import ClientFailed as ClientFailed
    from fedloom.common.errors import RunFailed as RunFailed
    from fedloom.common.errors import UserError as UserError
    from fedloom.common.randomness import numpy_generator as numpy_generator
    from fedloom.common.randomness import torch_generator as torch_generator

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "ClientFailed": "fedloom.common.errors",
        "RunFailed": "fedloom.common.errors",
        "UserError": "fedloom.common.errors",
        "numpy_generator": "fedloom.common.randomness",
        "torch_generator": "fedloom.common.randomness",
    },
)
