"""What travels between server and clients, and the operators that make it smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.messages.operators.base import Around as Around
    from fedloom.messages.operators.base import CannotEncode as CannotEncode
    from fedloom.messages.operators.base import Operator as Operator
    from fedloom.messages.operators.base import OperatorOptions as OperatorOptions
    from fedloom.messages.operators.flat import BadPayload as BadPayload
    from fedloom.messages.operators.flat import Part as Part
    from fedloom.messages.types import Cost as Cost
    from fedloom.messages.types import Failure as Failure
    from fedloom.messages.types import Payload as Payload
    from fedloom.messages.types import Update as Update

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "Around": "fedloom.messages.operators.base",
        "BadPayload": "fedloom.messages.operators.flat",
        "CannotEncode": "fedloom.messages.operators.base",
        "Cost": "fedloom.messages.types",
        "Failure": "fedloom.messages.types",
        "Operator": "fedloom.messages.operators.base",
        "OperatorOptions": "fedloom.messages.operators.base",
        "Part": "fedloom.messages.operators.flat",
        "Payload": "fedloom.messages.types",
        "Update": "fedloom.messages.types",
    },
)
