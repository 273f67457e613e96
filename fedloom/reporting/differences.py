"""Find the settings in which the recipes of several runs differ. This file does not know what a key means."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

#: The value of a key that a recipe does not have, such as an option of another algorithm.
ABSENT = object()


#: Keys that only describe a run.
NAMES = {"name", "description"}


Settings = Mapping[str, Any]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: {"train": {"lr": 1}} → {"train.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def find_differences(recipes: Sequence[Settings]) -> dict[str, list[Any]]:
    """Return key → values, one for each flat recipe, for keys that differ. Empty recipes are not compared."""
    keys = sorted({key for recipe in recipes for key in recipe} - NAMES)
    values = {key: [recipe.get(key, ABSENT) for recipe in recipes] for key in keys}
    compared = [i for i, recipe in enumerate(recipes) if recipe]
    return {key: found for key, found in values.items() if len({repr(found[i]) for i in compared}) > 1}


def find_unusual(differs: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return for each recipe the settings that differ from the most common value. In a tie the first value counts."""
    count = max((len(values) for values in differs.values()), default=0)
    unusual: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in differs.items():
        ((usual, _),) = Counter(map(repr, values)).most_common(1)
        for i, value in enumerate(values):
            if repr(value) != usual and value is not ABSENT:
                unusual[i][key] = value
    return unusual


def text(value: Any) -> str:
    """Format a value as on a command line; a dash where the recipe has none."""
    if value is ABSENT:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def line(values: Settings) -> str:
    """Format settings in one line: key=value, key=value."""
    return ", ".join(f"{key}={text(value)}" for key, value in values.items())
