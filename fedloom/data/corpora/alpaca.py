"""fed-alpaca: Stanford Alpaca's 52,002 instructions, split evenly among three clients."""

from __future__ import annotations

from fedloom.data.hub import HubRef
from fedloom.data.source import Source

SOURCE = Source(
    name="fed-alpaca",
    title="Stanford Alpaca, instructions written by a model",
    license="CC-BY-NC-4.0",
    homepage="https://huggingface.co/datasets/tatsu-lab/alpaca",
    columns={"instruction": "instruction", "input": "input", "output": "output"},
    default_split={"splitter": "uniform", "num_clients": 3},
    language="en",
    hub=HubRef("tatsu-lab/alpaca", revision="dce01c9b08f87459cf36a430d809084718273017"),
    rows=(52_002,),
    suite_note="free text has no right answer to compare with: scored by loss alone",
)
