"""Recipe keys and values as people type them: `train.lr=1e-3` on a command line, a bare string for a section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fedloom.errors import UserError


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``["train.lr=1e-3"]`` → ``{"train.lr": 0.001}``; values are read as YAML. Raises UserError."""
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise UserError(f"cannot read {argument!r}: an override has the form key=value, such as train.lr=1e-3")
        try:
            values[key.strip()] = scalar(yaml.safe_load(text))
        except yaml.YAMLError:
            raise UserError(f"cannot read the value of {argument!r}: it is not YAML") from None
    return values


def scalar(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; a user means the number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in "eE.") and value[0] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def nested_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: nested_copy(v) if isinstance(v, Mapping) else scalar(v) for k, v in values.items()}


#: Sections that may be written as a bare string, and the key that the string stands for.
_SHORTHAND = {"model": "name", "algorithm": "name"}


def set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    for i, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if isinstance(inner, str) and i == 0 and key in _SHORTHAND:
            inner = values[key] = {_SHORTHAND[key]: inner}
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise UserError(f"cannot set {dotted}: {'.'.join(keys[: i + 1])} is {inner!r} and has no keys of its own")
        values = inner
    last = keys[-1]
    if len(keys) == 1 and last in _SHORTHAND and isinstance(value, str) and isinstance(values.get(last), dict):
        values[last] = {**values[last], _SHORTHAND[last]: value}
        return
    # train.steps=… on the command line replaces a recipe's train.epochs, and the other way round.
    other = {"steps": "epochs", "epochs": "steps"}.get(last)
    if keys[:-1] == ["train"] and other and value is not None:
        values[other] = None
    values[last] = value
