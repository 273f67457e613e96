"""fed-dolly: Databricks' 15,011 instructions written by people, in eight categories, one per client."""

from __future__ import annotations

from fedloom.data.hub import HubRef
from fedloom.data.source import Source

SOURCE = Source(
    name="fed-dolly",
    title="databricks-dolly-15k, eight kinds of instruction",
    license="CC-BY-SA-3.0",
    homepage="https://huggingface.co/datasets/databricks/databricks-dolly-15k",
    columns={"instruction": "instruction", "input": "context", "output": "response", "category": "category"},
    default_split={"splitter": "meta"},
    language="en",
    hub=HubRef("databricks/databricks-dolly-15k", revision="bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"),
    rows=(15_011,),
    suite_note="free text has no right answer to compare with: scored by loss alone",
)
