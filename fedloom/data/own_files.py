"""The source of the user's own data: `data.path` is a file, a folder or a hub id, without `data.corpus`.

Usual column names are recognised and logged; `data.columns` overrides them. Data with a category column are split by
it,
one client per value; other data are split among three clients at random.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from fedloom.common.errors import UserError
from fedloom.data.examples import PEEK
from fedloom.data.files import data_files, read_files, stem_of
from fedloom.data.hub import HubRef
from fedloom.data.source import Source
from fedloom.recipe.recipe import DataConfig

#: Role → usual names; the first that exists is used.
USUAL_COLUMNS: dict[str, str | tuple[str, ...]] = {
    "instruction": ("instruction", "question", "prompt", "query", "conversations"),
    "input": ("input", "context"),
    "output": ("output", "answer", "response", "completion", "chosen"),
    "category": "category",
    "rejected": "rejected",
}


UNKNOWN_LICENSE = "unknown: set data.license"


def own_source(data: DataConfig) -> Source:
    """Return the source of `data.path`. Reads a file's first rows to find a category column; does not contact the hub.

    Raises:
        UserError: `data.path` is neither a data file, nor a folder of them, nor formed like a hub id.
    """
    path = data.path or ""
    place = Path(path).expanduser()
    files, _ = data_files(place)
    if not files and (place.exists() or HubRef.parse(path) is None):
        what = "has no data file" if place.exists() else "does not exist"
        raise UserError(
            f"data.path={path} {what}: give a .json, .jsonl, .csv or .parquet file, a folder of them, or a hub id"
        )
    category = (data.columns or {}).get("category")
    columns = {c for row in itertools.islice(read_files(files, name_files=False), PEEK) for c in row}
    by_category = category is not None or "category" in columns
    return Source(
        name=(stem_of(place) if files else path).replace("/", "-"),
        title="your own data",
        license=UNKNOWN_LICENSE,
        homepage=path,
        columns=USUAL_COLUMNS,
        default_split={"splitter": "meta"} if by_category else {"splitter": "uniform", "num_clients": 3},
        suite_note="scored by loss on held-out examples; name a suite in evaluation.suite if one fits",
    )
