"""An operator: one step of a payload's encoding, and its inverse.

    layout   the names, dtypes and counts that encode gives for such parts. Both sides compute it, so no message can
             claim other sizes
    encode   parts → parts, and a few JSON notes for the receiver
    decode   parts → parts, checked before memory is allocated

An operator changes only the parts that it is for. Lossy operators change floats; integers, booleans and bytes pass
unchanged. An operator does not know what the numbers mean, who sends them, or which other operators are in the chain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedloom.messages.operators.flat import FLOATS, BadPayload, Part, Parts, Spec, Table

Notes = dict[str, Any]


class CannotEncode(ValueError):
    """A payload that an operator cannot encode, such as one with non-finite numbers; the message says why."""


class OperatorOptions(BaseModel):
    """An operator's own options, given next to its name in a recipe. Unknown options are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LossyOptions(OperatorOptions):
    error_feedback: bool = Field(
        False, description="keep what this operator and later ones lose, and add it to the client's next update"
    )


@dataclass
class Around:
    """What an operator may read in addition to the parts.

    Attributes:
        table: names and shapes of the payload.
        generator: this message's random numbers; None when decoding.
        reference: name → tensor that both sides have; `delta` encodes the difference from it.
        exact: whether every operator of the chain is lossless.
    """

    table: Table
    generator: torch.Generator | None = None
    reference: Mapping[str, torch.Tensor] | None = None
    exact: bool = False


class Operator(ABC):
    """The base class of operators. Subclass it, and register the subclass (docs/operators.md).

    Attributes:
        lossless: whether decode(encode(x)) is x, bit for bit.
        needs_reference: whether both sides need the last broadcast.
        for_differences: whether it drops most numbers, and so would destroy whole weights.
        Options: the class of its options.
    """

    lossless: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    for_differences: ClassVar[bool] = False
    Options: ClassVar[type[OperatorOptions]] = OperatorOptions

    def __init__(self, options: OperatorOptions) -> None:
        self.options = options

    @property
    def error_feedback(self) -> bool:
        return isinstance(self.options, LossyOptions) and self.options.error_feedback

    @abstractmethod
    def layout(self, spec: Spec, exact: bool = False) -> Spec:
        """Return the layout of the parts that `encode` returns for such parts. `exact` as in `Around`."""

    @abstractmethod
    def encode(self, parts: Parts, around: Around) -> tuple[Parts, Notes]:
        """Return new parts, and notes for the receiver. Raises CannotEncode."""

    @abstractmethod
    def decode(self, parts: Parts, spec: Spec, notes: Notes, around: Around) -> Parts:
        """Return the parts that `encode` got; `spec` is their layout. Raises BadPayload."""

    def error(self, largest: float) -> float:
        """Return the largest difference of a decoded element, if no element is larger than `largest` in size."""
        return 0.0


def is_float(part: Part) -> bool:
    return part.dtype in FLOATS


def check_finite(values: torch.Tensor, what: str) -> torch.Tensor:
    """Return `values`. Raises CannotEncode if one is not finite: a single NaN would spoil a whole block."""
    if not bool(torch.isfinite(values).all()):
        raise CannotEncode(f"{what} needs finite numbers, but the payload has some that are not")
    return values


def check_no_notes(notes: Notes) -> None:
    if notes:
        raise BadPayload("the notes of an operator do not fit it: it writes none")
