"""Paired evaluations: the rules that score a corpus's answers.

A suite says how questions are answered (generate text, or choose among options) and judges one answer. It does not know
models, prompts or clients; score.py runs it. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from fedloom.common.errors import UserError

if TYPE_CHECKING:
    from fedloom.data.corpus import Example

#: The least verifier's score of a right answer: 1, up to rounding.
FULL_MARKS = 0.999


_NUMBER = re.compile(r"\s*\$?\s*([-+]?)\s*\$?\s*([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


@dataclass(frozen=True)
class Suite:
    """How the answers of a corpus are scored.

    Attributes:
        name: as in a recipe's `evaluation.suite`.
        kind: ``generate`` writes an answer and judges it with `right`; ``choice`` takes the most likely of
            `choice_texts`, which is right if it equals the example's output.
        max_new_tokens: tokens of the longest answer; 0 under ``choice``.
        right: (example, generated answer) → whether it is right; None under ``choice``.
        note: what the suite measures, as a phrase.
    """

    name: str
    kind: Literal["generate", "choice"]
    max_new_tokens: int
    right: Callable[[Example, str], bool] | None
    note: str

    def check(self, questions: Iterable[Example]) -> None:
        """Raise UserError unless each of these can be scored. Runs before anything is written or trained."""
        for question in questions:
            if self.right is None:
                choice_texts(question)
            else:
                self.right(question, "")


@cache
def _verifier(task: str) -> Callable[[str, Any], float]:
    """Return reasoning-gym's scoring function of a task. Raises UserError where the library or the task is missing."""
    try:
        library = import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise UserError(
            f'{error.name} is not installed, and the suite skills needs it: pip install "fedloom[skills]"'
        ) from None
    try:
        score: Callable[[str, Any], float] = library.get_score_answer_fn(task)
    except ValueError:
        raise UserError(f"the suite skills has no verifier for the task {task!r}: use it with fed-skills") from None
    return score


def skill_right(example: Example, answer: str) -> bool:
    """Return whether the skill's own verifier gives the stripped answer full marks."""
    if example.reference is None:
        raise UserError("the suite skills needs examples with a verifier's reference: use it with fed-skills")
    return _verifier(example.task)(answer.strip(), dict(example.reference)) >= FULL_MARKS


def final_number(text: str) -> Decimal | None:
    """Return the number after the last ``####``, without commas and $; None where there is none."""
    _, mark, tail = text.rpartition("####")
    match = _NUMBER.match(tail) if mark else None
    if match is None:
        return None
    try:
        return Decimal(match[1] + match[2].replace(",", ""))
    except InvalidOperation:
        return None


def gsm_right(example: Example, answer: str) -> bool:
    """Return whether the answer's final number equals the example's. Raises UserError where the example has none."""
    expected = final_number(example.output)
    if expected is None:
        raise UserError(
            f"the suite gsm needs answers ending in '#### number', not {example.output[-40:]!r}: choose another "
            "evaluation.suite, or null"
        )
    return final_number(answer) == expected


def choice_texts(example: Example) -> list[str]:
    """Return the answer strings to compare, in order, written as in training: one of them is `example.output`.

    Raises:
        UserError: the example has no choices, or its output is none of them.
    """
    plain = list(example.choices)
    lettered = [f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(plain)]
    for texts in (lettered, plain):
        if example.output in texts:
            return texts
    raise UserError(
        f"the suite multiple-choice needs an answer among {len(plain)} choices, not {example.output[:40]!r}: choose another "
        "evaluation.suite, or null"
    )


SKILLS = Suite("skills", "generate", 24, skill_right, "right answers by each skill's own verifier")


GSM = Suite("gsm", "generate", 256, gsm_right, "exact match of the number after the last ####")


MULTIPLE_CHOICE = Suite("multiple-choice", "choice", 0, None, "right choices by log-likelihood")
