"""The two ways in which a run can end badly, told apart by their exit code.

A `UserError` is a mistake in what was asked for: one sentence that names the value seen and the mend, exit code 2.
A `RunFailed` is work that could not be done though it was asked for correctly (quorum not met, disk full): one
sentence that says what was kept, exit code 1. Everything else is a programming error and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's: one sentence with the value and the mend. The CLI exits with 2."""


class RunFailed(RuntimeError):
    """The work failed: one sentence with what was kept. The CLI exits with 1."""


class ClientFailed(Exception):
    """Raised inside a client when its piece of work cannot be finished; becomes a `Failure`.

    Args:
        reason: a short code that may leave a site, such as ``non_finite``.
        detail: a sentence without any of the client's data in it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


#: What a disk says when it is full, read-only, broken, or not where the user means it to be.
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


def disk_trouble(error: BaseException, where: object = None) -> str | None:
    """The first half of a sentence about a disk that refused; None for any other error, which is a programming error.

    Args:
        where: what was to be written, where the error does not name a file itself.
    """
    number, name = None, where or "a file"
    if isinstance(error, OSError):
        number, name = error.errno, error.filename or name
    elif type(error).__name__ == "SafetensorError":  # it writes files itself, and says so in words
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    if number not in DISK:
        return None
    verb = "open" if number in {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG} else "write"
    return f"cannot {verb} {name} ({os.strerror(number)})"


def suggest(value: str, valid: Iterable[str]) -> str:
    """The end of an error sentence about a wrong name: the nearest valid name, or all of them.

    >>> suggest("fedagv", ["fedavg", "local"])
    'did you mean fedavg?'
    """
    names = sorted(valid)
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return "valid names are " + ", ".join(names) if names else "there are none"
