"""fed-codealpaca: instructions to write code, one programming language per client.

A local file with a `category` column (the language) is read as it is. The hub's CodeAlpaca-20k has no language column.
There the category is the first language that an instruction mentions, or "unspecified". When split by language,
"unspecified" is left out, and languages with fewer than 50 rows share the client "other".
"""

from __future__ import annotations

import re
from dataclasses import replace

from fedloom.data.corpus import Example
from fedloom.data.files import Row
from fedloom.data.hub import HubRef
from fedloom.data.source import Grouping, Source

UNSPECIFIED = "unspecified"


#: Language → a pattern for its name in a text. C and Go are everyday letters and words, so their patterns are strict.
LANGUAGES = {
    "javascript": r"javascript|java script|node\.?js|jquery|react(?:\.?js)?",
    "java": r"java",
    "python": r"python|numpy|pandas|django|flask",
    "c++": r"c\+\+|cpp",
    "c#": r"c#|c sharp|\.net",
    "c": r"(?:in|using) c|c (?:program|code|function)",
    "typescript": r"typescript",
    "php": r"php",
    "sql": r"sql|mysql|postgresql|sqlite",
    "bash": r"bash|shell script|shell command|linux command",
    "html": r"html5?",
    "css": r"css3?",
    "ruby": r"ruby",
    "swift": r"swift",
    "go": r"golang|in go|go (?:program|code|function)",
    "kotlin": r"kotlin",
    "scala": r"scala",
    "perl": r"perl",
    "rust": r"rust",
    "r": r"in r|r (?:program|code|function)",
}


_MENTION = re.compile(
    r"(?<![\w.#+])(?:" + "|".join(f"(?P<g{i}>{p})" for i, p in enumerate(LANGUAGES.values())) + r")(?![\w#+])",
    re.IGNORECASE,
)


def find_language(text: str) -> str:
    """Return the first language that `text` mentions, or ``unspecified``."""
    match = _MENTION.search(text)
    return list(LANGUAGES)[int(str(match.lastgroup)[1:])] if match else UNSPECIFIED


def set_language(example: Example, row: Row) -> Example:
    """Set the category to the row's own language, else to the one that its instruction or input mentions."""
    if example.category:
        return example
    return replace(example, category=find_language(f"{example.instruction}\n{example.input}"))


SOURCE = Source(
    name="fed-codealpaca",
    title="CodeAlpaca, code by programming language",
    license="CC-BY-NC-4.0",
    homepage="https://huggingface.co/datasets/sahil2801/CodeAlpaca-20k",
    columns={"instruction": "instruction", "input": "input", "output": "output", "category": "category"},
    default_split={"splitter": "meta"},
    language="en",
    hub=HubRef("sahil2801/CodeAlpaca-20k", revision="152bb5e9a29651266b018106053980070a0521a1"),
    rows=(20_022, 4_535),  # the hub's, and the collection that has a language column
    suite_note="its pairs, HumanEval and HumanEval-X, run generated code and arrive with lm-eval: scored by loss until then",
    grouping=Grouping(drop=(UNSPECIFIED,), fewest=50, merged="other"),
    complete=set_language,
)
