"""Write files completely or not at all, and lock files until their process ends."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file completely or not at all. Raises OSError, and then leaves no file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException as error:
        Path(scratch).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not set it
        raise


def is_unfinished(path: Path) -> bool:
    """Return whether this is a file that a killed process began to write and did not rename."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def link_file(path: Path, to: Path) -> None:
    """Link `to` to the file `path`; copy it where the file system has no hard links."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def write_json(path: Path, values: Mapping[str, Any], rows: str | None = None) -> None:
    """Write readable JSON completely or not at all; refuses non-finite numbers.

    A list under `rows` has one line per item.
    """
    text = json.dumps({**values, rows: []} if rows else values, indent=2, allow_nan=False, ensure_ascii=False)
    if rows and values[rows]:
        lines = ",\n    ".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in values[rows])
        text = text.replace(f'"{rows}": []', f'"{rows}": [\n    {lines}\n  ]')
    write_bytes(path, (text + "\n").encode())


def folder_name(client: str) -> str:
    """Return a client's name as a folder's name: readable, without separators, never hidden, never too long."""
    name = quote(client, safe=" +#")
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    return name if len(name) <= 100 else f"{name[:80]}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"


def lock_file(path: Path) -> TextIO | None:
    """Lock the file until it is closed or the process ends; return None if another process has the lock."""
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
