"""A file with one client's part of a corpus, for a site when the corpus was split beforehand.

The first line describes the shard. Each further line is one example with its part (train, validation or test) and
whether it is a scored question. A site with such a file uses its split; a site with any other data splits it itself
(`own_split`). This file does not know how a corpus is split among clients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedloom.common.errors import UserError
from fedloom.data.corpus import Corpus, Example, Partition, Shard

FORMAT = "fedloom-shard-1"


PARTS = ("train", "validation", "test")


def write_shard(path: Path, corpus: Corpus, shard: Shard, questions: Sequence[int]) -> None:
    """Write `shard`'s examples. The file has no data of any other client."""
    about = {"format": FORMAT, "corpus": corpus.name, "license": corpus.license, "source": corpus.source}
    lines: list[dict[str, Any]] = [{**about, "suite": corpus.suite}]
    asked = set(questions)
    for part in PARTS:
        for i in getattr(shard, part):
            lines.append({"part": part, "question": i in asked, **asdict(corpus.examples[i])})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def is_shard(path: Path) -> bool:
    """Return whether a file was written by `write_shard`. Reads its first line."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return FORMAT.encode() in file.readline(4096)


def read_shard(path: Path, client: str, seed: int) -> tuple[Corpus, Partition, tuple[int, ...]]:
    """Read a shard: return (the client's examples as a corpus, its partition, indices of its questions).

    Raises UserError.
    """
    try:
        with path.open(encoding="utf-8") as file:
            about = json.loads(file.readline())
            rows = [json.loads(line) for line in file]
        parts = {part: tuple(i for i, row in enumerate(rows) if row["part"] == part) for part in PARTS}
        questions = tuple(i for i, row in enumerate(rows) if row["question"])
        examples = tuple(_parse_example(row) for row in rows)
        corpus = Corpus(about["corpus"], examples, about["license"], about["source"], about["suite"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the shard {path.name} cannot be read ({type(error).__name__}): deal it again") from None
    return corpus, Partition({client: Shard(**parts)}, "dealt", seed), questions


def _parse_example(row: dict[str, Any]) -> Example:
    values = {k: v for k, v in row.items() if k not in {"part", "question"}}
    return replace(Example(**values), choices=tuple(values.get("choices", ())))
