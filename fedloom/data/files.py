"""Rows from files: .json, .jsonl, .csv and .parquet, and .gz of the text formats, one row at a time where the format allows.

A row is a plain dict of the file's own columns. This file does not know which column plays which role; loading.py does.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from fedloom.common.errors import UserError

Row = dict[str, Any]


#: What a data file may be called. Parquet compresses itself, so it has no .gz form.
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")


#: The column that rows of a folder get: the name of the file that they came from, without its suffixes.
FILE_COLUMN = "file"


def suffix_of(path: Path) -> str | None:
    """The data suffix of a path, such as ``.jsonl.gz``, or None where it is no data file."""
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s) and name != s), None)


def stem_of(path: Path) -> str:
    """The file's name without its data suffix."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.name


def data_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The training files and the test files behind `path`, a file or a folder.

    A file is training data. In a folder, files called ``test`` are the corpus's own test set and all others are training
    data, in alphabetical order; other suffixes and hidden files are passed over. Both lists may be empty.

    Raises:
        UserError: a file of another kind, or two files that differ in their suffix alone (read twice, rows would double).
    """
    if path.is_file():
        if suffix_of(path) is None:
            raise UserError(f"{path} is not a data file: its name ends in none of {', '.join(SUFFIXES)}")
        return [path], []
    if not path.is_dir():
        return [], []
    found = sorted(p for p in path.iterdir() if p.is_file() and suffix_of(p) and not p.name.startswith("."))
    by_stem: dict[str, Path] = {}
    for file in found:
        if stem_of(file) in by_stem:
            raise UserError(f"{path} holds both {by_stem[stem_of(file)].name} and {file.name}: keep one of them")
        by_stem[stem_of(file)] = file
    return [f for f in found if stem_of(f) != "test"], [f for f in found if stem_of(f) == "test"]


def read_files(paths: list[Path], *, name_files: bool) -> Iterator[Row]:
    """The rows of several files, one after the other; with `name_files` each says which file it is from."""
    for path in paths:
        for row in read_rows(path):
            yield {FILE_COLUMN: stem_of(path), **row} if name_files else row


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in its order. Raises UserError with the file and the line where it cannot be read."""
    suffix = suffix_of(path)
    if suffix is None:
        raise UserError(f"{path} is not a data file: its name ends in none of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    reader = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}[suffix.removesuffix(".gz")]
    try:
        with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as stream:
            yield from reader(path, cast(BinaryIO, stream))
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): download or compress it again") from None


def _text(path: Path, content: bytes, line: int) -> str:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].count(b"\n")
        raise UserError(f"{path}, line {line + before} is not UTF-8 text: save the file as UTF-8") from None


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = line + error.lineno - 1
        raise UserError(
            f"{path}, line {where} is not JSON ({error.msg}, column {error.colno}): mend that line"
        ) from None


def _object(path: Path, value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)
        raise UserError(
            f'{path}, {where} holds {kind}: every row is an object such as {{"instruction": …, "output": …}}'
        )
    return value


def _jsonl(path: Path, stream: BinaryIO) -> Iterator[Row]:
    for line, content in enumerate(stream, start=1):
        text = _text(path, content, line).strip()
        if text:
            yield _object(path, _parsed(path, text, line), f"line {line}")


def _json(path: Path, stream: BinaryIO) -> Iterator[Row]:
    """A JSON array, or an object that holds one array. JSON lines under the name .json are common, and are read as such."""
    content = stream.read()
    text = _text(path, content, 1)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(path, io.BytesIO(content))
            return
        value = _parsed(path, text, 1)
    if isinstance(value, dict):
        arrays = {key: inner for key, inner in value.items() if isinstance(inner, list)}
        if len(arrays) != 1:
            seen = ", ".join(arrays) or "none"
            raise UserError(
                f"{path} is an object with {len(arrays)} arrays ({seen}) and not one: keep the array of rows alone"
            )
        value = next(iter(arrays.values()))
    if not isinstance(value, list):
        raise UserError(f"{path} holds a single {type(value).__name__}: a .json file is an array of objects")
    for i, row in enumerate(value):
        yield _object(path, row, f"element {i}")


def _csv(path: Path, stream: BinaryIO) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        if not reader.fieldnames:
            return
        width = len(reader.fieldnames)
        for row in reader:
            if None in row or None in row.values():
                more = "more" if None in row else "fewer"
                raise UserError(
                    f"{path}, line {reader.line_num} has {more} fields than the {width} of the header: "
                    "put double quotes around fields that hold commas or line breaks"
                )
            yield dict(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num} is not CSV ({error}): mend that line") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}, near line {reader.reader.line_num + 1} is not UTF-8 text: save the file as UTF-8"
        ) from None


def _parquet(path: Path) -> Iterator[Row]:
    parquet = import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise UserError(f"{path} is not a readable Parquet file ({error}): write it again") from None
