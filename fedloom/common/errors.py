"""The errors that end a run, with their exit codes.

A `UserError` is a mistake in a request: one sentence with the wrong value and how to fix it, exit code 2.
A `RunFailed` is correct work that failed (quorum not met, disk full): one sentence with what was kept, exit code 1.
Every other exception is a programming error and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user: one sentence with the wrong value and how to fix it. The CLI exits with 2."""


class RunFailed(RuntimeError):
    """The work failed: one sentence with what was kept. The CLI exits with 1."""


class ClientFailed(Exception):
    """A client cannot finish its piece of work; becomes a `Failure`.

    Args:
        reason: a short code that may leave a site, such as ``non_finite``.
        detail: a sentence without any of the client's data.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


#: Error numbers of a disk that is full, read-only, broken, or missing.
DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}


def describe_disk_error(error: BaseException, where: object = None) -> str | None:
    """Return the first half of an error sentence if a disk caused the error; None for every other error.

    Args:
        error: what was raised.
        where: what was to be written, if the error does not name a file.
    """
    number, name = None, where or "a file"
    if isinstance(error, OSError):
        number, name = error.errno, error.filename or name
    elif type(error).__name__ == "SafetensorError":  # it writes files itself, and has the number only in its text
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    if number not in DISK:
        return None
    verb = "open" if number in {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG} else "write"
    return f"cannot {verb} {name} ({os.strerror(number)})"


def suggest(value: str, valid: Iterable[str]) -> str:
    """Return the end of an error sentence about a wrong name: the nearest valid name, or all of them.

    >>> suggest("fedagv", ["fedavg", "local"])
    'did you mean fedavg?'
    """
    names = sorted(valid)
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return "valid names are " + ", ".join(names) if names else "there are none"
