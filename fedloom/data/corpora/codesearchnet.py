"""fed-codesearchnet: does this function do what the description says? Six programming languages, one per client.

CodeSearchNet (Husain et al., arXiv 1909.09436) has functions with their documentation. Every second row keeps its own
description, and its answer is Yes. The row after it gets the description of the row before it in the same language,
which
belongs to another function; its answer is No. So half of the answers are Yes in every language, and the score is the
share of right answers. Rows are read one after another; only the last row of each language is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from fedloom.data.corpus import Example
from fedloom.data.files import Row
from fedloom.data.hub import HubRef
from fedloom.data.source import Source

QUESTION = "Does this {language} function do what the description says? Answer Yes or No."


ANSWERS = ("Yes", "No")


#: Column names on the hub, and in CodeSearchNet's own files.
CODE = ("func_code_string", "code")


DESCRIPTION = ("func_documentation_string", "docstring")


def pair_descriptions(rows: Iterable[Row]) -> Iterator[Row]:
    """Turn rows into questions, answered Yes and No in turn within each language.

    Rows without code or description are left out.
    """
    before: dict[str, str] = {}
    for row in rows:
        code, described = _first_value(row, CODE), _first_value(row, DESCRIPTION)
        language = str(row.get("language") or "")
        if not code or not described:
            continue
        other = before.pop(language, None)
        if other is None:
            before[language] = described
        elif other == described:  # the same description would be right: the answer could not be No
            before[language] = described
            continue
        yield {
            "instruction": QUESTION.format(language=language).replace("  ", " "),
            "input": f"Description: {other or described}\n\n{code}",
            "output": ANSWERS[other is not None],
            "language": language,
        }


def set_answer(example: Example, row: Row) -> Example:
    return replace(example, choices=ANSWERS, task="code-matches-description")


def _first_value(row: Row, columns: tuple[str, ...]) -> str:
    return next((str(row[c]).strip() for c in columns if row.get(c)), "")


SOURCE = Source(
    name="fed-codesearchnet",
    title="CodeSearchNet, does the code do what is said of it",
    license="the licences of the repositories that the functions come from",
    homepage="https://github.com/github/CodeSearchNet",
    columns={"instruction": "instruction", "input": "input", "output": "output", "category": "language"},
    default_split={"splitter": "meta"},
    language="en",
    hub=HubRef(
        "code-search-net/code_search_net",
        config="all",
        test_split="test",
        revision="fdc6a9e39575768c27eb8a2a5f702bf846eb4759",
    ),
    suite="multiple-choice",
    suite_note="accuracy: Yes or No, whichever has the higher log-likelihood",
    rewrite=pair_descriptions,
    complete=set_answer,
)
