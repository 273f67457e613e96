"""What pydantic finds wrong in settings, as one sentence: the key, the value seen and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedloom.common.errors import UserError, suggest

Options = TypeVar("Options", bound=BaseModel)


@dataclass(frozen=True)
class Complaint:
    """The first thing that is wrong in some settings.

    Attributes:
        key: where, with dots between its parts; empty where it is the settings as a whole.
        value: what was given there.
        message: what is wrong with it, without a capital letter at its start.
        unknown: there is no such key.
        own: `message` is a sentence of fedloom's, which names key and value itself.
    """

    key: str
    value: Any
    message: str
    unknown: bool
    own: bool

    def __str__(self) -> str:
        """As part of a sentence that names the file: "rounds: input should be …"."""
        return f"{self.key}: {self.message}" if self.key else self.message

    def of(self, name: str = "", prefix: str = "") -> str:
        """As a sentence by itself, about a value and not about an unknown key: "decay=1.0 is not valid for NAME: …".

        Args:
            name: whose settings these are; of a recipe's own keys empty.
            prefix: what the user writes before the key.
        """
        if self.own:
            return f"{name}: {self.message}" if name else self.message
        return f"{prefix}{self.key}={self.value!r} is not valid{name and f' for {name}'}: {self.message}"


def first_complaint(error: ValidationError) -> Complaint:
    """The first of pydantic's complaints."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    key = ".".join(str(part) for part in first["loc"])
    own = first["type"] == "value_error" and key in message  # a field's own check may leave its name to us
    if not own and message[:1].isupper():
        message = message[0].lower() + message[1:]
    return Complaint(key, first["input"], message, first["type"] == "extra_forbidden", own)


def parse_options(
    cls: type[Options], values: Mapping[str, Any], name: str, prefix: str = "", where: str = ""
) -> Options:
    """The options that a recipe gives something that it names, checked.

    Args:
        cls: the class of options.
        name: whose they are, such as "the hook ema".
        prefix: what is before each key in a recipe, such as "algorithm.".
        where: how a sentence about them begins, such as "operators.up: ".

    Raises UserError with the nearest valid option, or what is wrong with the value.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        complaint = first_complaint(error)
    if complaint.unknown:
        valid = [prefix + key for key in cls.model_fields]
        hint = suggest(prefix + complaint.key, valid) if valid else f"{name} has no options"
        raise UserError(f"{where}unknown option {prefix}{complaint.key} of {name}: {hint}")
    raise UserError(where + complaint.of(name, prefix))
