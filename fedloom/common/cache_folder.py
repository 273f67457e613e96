"""fedloom's cache folder on this machine: its path, its parts, and how to delete them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from fedloom.common.errors import UserError, suggest


def cache_home() -> Path:
    """Return the cache folder: ``$FEDLOOM_HOME``, else ``fedloom`` in the user's cache folder."""
    if explicit := os.environ.get("FEDLOOM_HOME"):
        return Path(explicit).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fedloom"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedloom"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedloom"


#: Names of the cache's parts, which are folders.
CACHES = ("carriers", "models", "tokenised", "prefix", "compiled")


def clear_cache(which: str) -> Path:
    """Delete one part of the cache, or all of it. Raises UserError for an unknown part."""
    if which not in (*CACHES, "all"):
        raise UserError(f"the cache has no part {which!r}: {suggest(which, [*CACHES, 'all'])}")
    for name in CACHES if which == "all" else (which,):
        shutil.rmtree(cache_home() / name, ignore_errors=True)
    return cache_home() if which == "all" else cache_home() / which
