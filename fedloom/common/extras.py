"""Libraries that only some runs need, and the extra of fedloom that installs each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedloom.common.errors import UserError

#: Library → extra.
EXTRAS = {"nvflare": "distributed", "ray": "ray"}


@contextmanager
def needing_extras() -> Iterator[None]:
    """In this block the import of a library of `EXTRAS` that is not installed raises UserError, with what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        raise UserError(f"{library} is not installed: pip install 'fedloom[{EXTRAS[library]}]'") from None
