"""Read rows from files: .json, .jsonl, .csv, .parquet, and .gz of text formats; one row at a time if the format allows
it.

A row is a plain dict of the file's own columns. This file does not know which column has which role; examples.py does.
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


#: Suffixes of data files. Parquet compresses itself, so it has no .gz form.
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")


#: A column that rows of a folder get: the name of their file, without its suffixes.
FILE_COLUMN = "file"


def suffix_of(path: Path) -> str | None:
    """Return the data suffix of a path, such as ``.jsonl.gz``; None if it is no data file."""
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s) and name != s), None)


def stem_of(path: Path) -> str:
    """Return the file's name without its data suffix."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.name


def data_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the training files and the test files of `path`, a file or a folder.

    A file is training data. In a folder, files called ``test`` are the corpus's own test set, and all others are
    training
    data, in alphabetical order; other suffixes and hidden files are ignored. Both lists may be empty.

    Raises:
        UserError: a file of another kind, or two files that differ only in their suffix (rows would be read twice).
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
            raise UserError(f"{path} has both {by_stem[stem_of(file)].name} and {file.name}: remove one of them")
        by_stem[stem_of(file)] = file
    return [f for f in found if stem_of(f) != "test"], [f for f in found if stem_of(f) == "test"]


def read_files(paths: list[Path], *, name_files: bool) -> Iterator[Row]:
    """Yield the rows of several files, one after the other; with `name_files` each row has its file's name."""
    for path in paths:
        for row in read_rows(path):
            yield {FILE_COLUMN: stem_of(path), **row} if name_files else row


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one file, in order. Raises UserError with the file and the line if it cannot be read."""
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
        raise UserError(f"{path} is not a complete gzip file ({error}): download or compress it again") from None


def _text(path: Path, content: bytes, line: int) -> str:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].count(b"\n")
        raise UserError(f"{path}, line {line + before} is not UTF-8 text: save the file as UTF-8") from None


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = line + error.lineno - 1
        raise UserError(
            f"{path}, line {where} is not JSON ({error.msg}, column {error.colno}): fix that line"
        ) from None


def _check_object(path: Path, value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)
        raise UserError(
            f'{path}, {where} is {kind}, but every row must be an object such as {{"instruction": …, "output": …}}'
        )
    return value


def _jsonl(path: Path, stream: BinaryIO) -> Iterator[Row]:
    for line, content in enumerate(stream, start=1):
        text = _text(path, content, line).strip()
        if text:
            yield _check_object(path, _parse(path, text, line), f"line {line}")


def _json(path: Path, stream: BinaryIO) -> Iterator[Row]:
    """Read a JSON array, or an object with one array.

    JSON lines in a file called .json are common, and are read too.
    """
    content = stream.read()
    text = _text(path, content, 1)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(path, io.BytesIO(content))
            return
        value = _parse(path, text, 1)
    if isinstance(value, dict):
        arrays = {key: inner for key, inner in value.items() if isinstance(inner, list)}
        if len(arrays) != 1:
            seen = ", ".join(arrays) or "none"
            raise UserError(
                f"{path} is an object with {len(arrays)} arrays ({seen}), but must have one: keep only the array of rows"
            )
        value = next(iter(arrays.values()))
    if not isinstance(value, list):
        raise UserError(f"{path} is a single {type(value).__name__}, but a .json file must be an array of objects")
    for i, row in enumerate(value):
        yield _check_object(path, row, f"element {i}")


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
                    "put double quotes around fields that contain commas or line breaks"
                )
            yield dict(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num} is not CSV ({error}): fix that line") from None
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
