"""Rows → examples: which column plays which role, what is left out, how small categories are grouped, how few are kept.

This file does not know where rows were found; loading.py does.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from fedloom.common.errors import UserError
from fedloom.common.randomness import numpy_generator
from fedloom.data.conversations import add_prompt, answer_text, prompt_text
from fedloom.data.corpus import Example
from fedloom.data.files import Row
from fedloom.data.source import Grouping, Source
from fedloom.recipe.recipe import DataConfig

log = logging.getLogger(__name__)

ROLES = ("instruction", "input", "output", "category", "rejected")


#: Rows looked at to see which columns there are.
PEEK = 100


@dataclass
class Reading:
    """Examples read so far, what was left out, and every column seen."""

    examples: list[Example] = field(default_factory=list)
    empty: int = 0
    seen: dict[str, None] = field(default_factory=dict)


def read_examples(
    rows: Iterable[Row], source: Source, data: DataConfig, by: str, where: str, *, may_be_empty: bool = False
) -> Reading:
    """Rows → examples, one at a time. Raises UserError for a missing column, no rows, or no answers."""
    iterator = map(add_prompt, rows)
    first = list(itertools.islice(iterator, PEEK))
    columns, guessed = _columns(source, data, {column for row in first for column in row})
    if guessed and not may_be_empty:  # a test set has the training set's columns
        log.info(f"{source.name}: reading {', '.join(guessed)} (data.columns says otherwise)")
    reading = Reading()
    for row in itertools.chain(first, iterator):
        reading.seen.update(dict.fromkeys(row))
        output = as_text(answer_text(row.get(columns["output"])))
        rejected = as_text(answer_text(row.get(columns["rejected"])))
        if not output.strip():
            reading.empty += 1
            continue
        example = Example(
            instruction=as_text(prompt_text(row.get(columns["instruction"]))),
            input=as_text(row.get(columns["input"])),
            output=output,
            category=as_text(row.get(columns["category"])).strip(),
            rejected=rejected,
        )
        if source.complete:
            example = source.complete(example, row)
        if by != "category":
            example = replace(example, category=as_text(row.get(by)).strip())
        reading.examples.append(example)
    if may_be_empty and not first:
        return reading
    if not first:
        raise UserError(f"{where} has no rows: give a file with at least one example")
    _check_columns(columns, data, by, reading.seen, where)
    if not reading.examples and not may_be_empty:
        raise UserError(
            f"all {reading.empty:,} rows of {where} have an empty answer in the column {columns['output']!r}: "
            "say which column holds the answers with data.columns.output=NAME"
        )
    return reading


def without_leaks(examples: list[Example], test: Sequence[Example]) -> tuple[list[Example], int]:
    """The examples whose question is not one of the corpus's own test set, and how many were left out.

    Questions are the same where their words are, whatever the case and the white space between them.
    """
    asked = {question_of(e) for e in test}
    kept = [e for e in examples if question_of(e) not in asked] if asked else examples
    return kept, len(examples) - len(kept)


def question_of(example: Example) -> str:
    """What identifies a question: its words."""
    return " ".join(f"{example.instruction} {example.input}".casefold().split())


def paired(examples: Sequence[Example]) -> tuple[list[Example], dict[str, int]]:
    """Those with a rejected answer that differs from the preferred one, and how many were left out for which reason."""
    kept = [e for e in examples if e.rejected.strip() and e.rejected != e.output]
    same = sum(e.rejected == e.output for e in examples)
    reasons = {"empty_rejected_answer": len(examples) - len(kept) - same, "rejected_is_the_answer": same}
    return kept, {reason: count for reason, count in reasons.items() if count}


def group(examples: Sequence[Example], grouping: Grouping) -> tuple[list[Example], dict[str, int]]:
    """Examples with small categories merged and meaningless ones left out, and how many were left out of which."""
    counts = Counter(e.category for e in examples)
    small = {c for c, n in counts.items() if n < grouping.fewest and c not in grouping.drop}
    kept = [
        replace(e, category=grouping.merged) if e.category in small else e
        for e in examples
        if e.category not in grouping.drop
    ]
    return kept, {f"category_{c}": counts[c] for c in grouping.drop if counts[c]}


def limited(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """At most `limit` examples drawn with the seed, categories in proportion, in their original order.

    Every category keeps at least one as long as the limit allows; remainders go to the largest fractions.
    """
    if limit >= len(examples):
        return list(examples)
    places: dict[str, list[int]] = {}
    for i, e in enumerate(examples):
        places.setdefault(e.category, []).append(i)
    names = sorted(places)
    floor = 1 if limit >= len(names) else 0
    shares = {c: len(places[c]) * limit / len(examples) for c in names}
    quota = {c: max(floor, math.floor(shares[c])) for c in names}
    missing = limit - sum(quota.values())
    for c in sorted(names, key=lambda c: (-(shares[c] - quota[c]), c))[: max(missing, 0)]:
        quota[c] += 1
    for _ in range(-missing):  # the floor of one gave out too many: the largest give back
        quota[max(names, key=lambda c: (quota[c], c))] -= 1
    rng = numpy_generator(seed, "corpus")
    kept: list[int] = []
    for c in names:
        kept += [places[c][j] for j in rng.permutation(len(places[c]))[: quota[c]]]
    return [examples[i] for i in sorted(kept)]


def as_text(value: Any) -> str:
    """A cell as text: what is missing (None, NaN) is the empty string, never the word for it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else str(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _columns(source: Source, data: DataConfig, present: set[str]) -> tuple[dict[str, str], list[str]]:
    """Role → column: the recipe's word first, then the source's candidates, of which the first present is taken; and
    what was guessed, in words."""
    columns: dict[str, str] = {}
    guessed: list[str] = []
    for role in ROLES:
        declared = source.columns.get(role, role)
        candidates = (declared,) if isinstance(declared, str) else declared
        own = cast(dict[str, str], data.columns or {}).get(role)
        columns[role] = own or next((c for c in candidates if c in present), candidates[0])
        if data.corpus is None and own is None and columns[role] in present and columns[role] != role:
            guessed.append(f"{role} from {columns[role]!r}")
    return columns, guessed


def _check_columns(columns: dict[str, str], data: DataConfig, by: str, seen: Mapping[str, None], where: str) -> None:
    there = ", ".join(seen)
    needed = ["instruction", "output"] + [
        role for role in ("input", "category", "rejected") if role in (data.columns or {})
    ]
    for role in needed:
        if columns[role] not in seen:
            raise UserError(
                f"{where} has no column {columns[role]!r} for the {role}; its columns are {there}: "
                f"say which one it is with data.columns.{role}=NAME"
            )
    if by != "category" and by not in seen:
        raise UserError(
            f"{where} has no column {by!r} to split by; its columns are {there}: set split.by to one of them"
        )
