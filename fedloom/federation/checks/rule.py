"""A refusal: when it applies, and the sentence that the user is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fedloom.common.errors import UserError

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Rule(Generic[Facts]):
    """One thing that cannot be.

    Attributes:
        name: identifies the rule in tests and docs, as ``subject.reason``.
        about: what is refused, for docs/refusals.md.
        when: what is wrong with these facts, such as the name of a hook; anything false where nothing is.
        says: (facts, what `when` found) → what is wrong, the value, and how to fix it.
    """

    name: str
    about: str
    when: Callable[[Facts], Any]
    says: Callable[[Facts, Any], str]


def refuse(rules: Sequence[Rule[Facts]], facts: Facts) -> None:
    """Raise UserError with the sentence of the first rule that applies. Rules are tried in the order of their table."""
    for rule in rules:
        if found := rule.when(facts):
            raise UserError(rule.says(facts, found))
