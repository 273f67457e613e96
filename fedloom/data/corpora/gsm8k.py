"""fed-gsm8k: 7,473 grade-school word problems with worked answers ending in `#### n`, and 1,319 more as the test set."""

from __future__ import annotations

from dataclasses import replace

from fedloom.data.corpus import Example
from fedloom.data.files import Row
from fedloom.data.hub import HubRef
from fedloom.data.source import Source


def set_task(example: Example, row: Row) -> Example:
    """Give all questions one task, whichever client has them."""
    return replace(example, task="gsm8k")


SOURCE = Source(
    name="fed-gsm8k",
    title="GSM8K, grade-school mathematics in words",
    license="MIT",
    homepage="https://github.com/openai/grade-school-math",
    columns={"instruction": "question", "output": "answer"},
    default_split={"splitter": "uniform", "num_clients": 3},
    language="en",
    hub=HubRef("openai/gsm8k", config="main", test_split="test", revision="e53f048856ff4f594e959d75785d2c2d37b678ee"),
    rows=(7_473,),
    suite="gsm",
    suite_note="exact match of the number after ####, on the corpus's own test set",
    complete=set_task,
)
