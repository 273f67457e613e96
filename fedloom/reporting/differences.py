"""In what the recipes of several runs differ. This file does not know what a key means."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

#: Stands where a recipe does not have the key, as the options of another algorithm.
ABSENT = object()


#: Keys that name a run and change nothing in it.
NAMES = {"name", "description"}


Settings = Mapping[str, Any]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} → {"train.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def differing(recipes: Sequence[Settings]) -> dict[str, list[Any]]:
    """Key → its value in each of the flat recipes, for keys that are not the same in all; empty recipes have no say."""
    keys = sorted({key for recipe in recipes for key in recipe} - NAMES)
    values = {key: [recipe.get(key, ABSENT) for recipe in recipes] for key in keys}
    told = [i for i, recipe in enumerate(recipes) if recipe]
    return {key: found for key, found in values.items() if len({repr(found[i]) for i in told}) > 1}


def unusual(differs: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Of each recipe, what it says otherwise than most do; where none is commonest, the first to say something is."""
    count = max((len(values) for values in differs.values()), default=0)
    told: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in differs.items():
        ((usual, _),) = Counter(map(repr, values)).most_common(1)
        for i, value in enumerate(values):
            if repr(value) != usual and value is not ABSENT:
                told[i][key] = value
    return told


def text(value: Any) -> str:
    """A value as it may be given on a command line; a dash where the recipe has none."""
    if value is ABSENT:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def line(values: Settings) -> str:
    """A few settings in one line."""
    return ", ".join(f"{key}={text(value)}" for key, value in values.items())
