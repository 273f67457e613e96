"""An operator is one step on a payload's way: it encodes flat parts, and decodes what it made.

    layout   what encode makes of such parts: names, dtypes, counts. Both sides compute it, so a message cannot claim sizes
    encode   parts → parts, and a few JSON notes for the other side
    decode   parts → parts, checked before anything is allocated

An operator acts on every part that it is for and hands the others on: lossy ones act on floats, and integers, booleans
and bytes pass them unchanged. It does not know what the numbers mean, who sends them, nor which operators stand beside it.
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
    """A payload that an operator does not take, such as one with numbers that are not finite; says why in one sentence."""


class OperatorOptions(BaseModel):
    """An operator's own options, which stand beside its name in a recipe. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LossyOptions(OperatorOptions):
    error_feedback: bool = Field(
        False, description="keep what this operator and those after it lost, and add it to the client's next update"
    )


@dataclass
class Around:
    """What an operator may read besides the parts.

    Attributes:
        table: names and shapes of the payload.
        generator: this message's random numbers; None when decoding.
        reference: name → tensor that both sides hold, what `delta` is against.
        exact: every operator of the chain is lossless.
    """

    table: Table
    generator: torch.Generator | None = None
    reference: Mapping[str, torch.Tensor] | None = None
    exact: bool = False


class Operator(ABC):
    """Subclass, and name it in the registry (docs/operators.md).

    Attributes:
        lossless: decode(encode(x)) is x, bit for bit.
        needs_reference: works only where both sides hold the last broadcast.
        for_differences: leaves out most numbers, so that on whole weights it would destroy them.
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
        """What `encode` makes of parts like these. `exact` as in `Around`."""

    @abstractmethod
    def encode(self, parts: Parts, around: Around) -> tuple[Parts, Notes]:
        """New parts and notes. Raises CannotEncode."""

    @abstractmethod
    def decode(self, parts: Parts, spec: Spec, notes: Notes, around: Around) -> Parts:
        """The parts that `encode` was given, of which `spec` is the layout. Raises BadPayload."""

    def error(self, largest: float) -> float:
        """The most by which a decoded element can differ, given that none is larger than this in size."""
        return 0.0


def is_float(part: Part) -> bool:
    return part.dtype in FLOATS


def finite(values: torch.Tensor, what: str) -> torch.Tensor:
    """`values`, or CannotEncode where one is not finite: one NaN would spoil a whole block."""
    if not bool(torch.isfinite(values).all()):
        raise CannotEncode(f"{what} takes finite numbers only, and the payload has some that are not")
    return values


def no_notes(notes: Notes) -> None:
    if notes:
        raise BadPayload("an operator's notes are not what it writes")
