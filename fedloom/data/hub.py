"""Load rows from the Hugging Face hub at a pinned revision. A missing connection is detected in seconds; nothing hangs.

`datasets` does the work and has the cache. This file does not know roles or corpora; it yields rows or says why it
cannot.
"""

from __future__ import annotations

import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fedloom.data.files import Row

#: Seconds to wait for an answer of the hub.
PATIENCE = 4.0


def hub_disabled() -> bool:
    """Return whether the environment forbids the hub."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)


def hub_reachable(patience: float = PATIENCE) -> bool:
    """Return whether the hub answers within `patience` seconds. Uses the environment's proxies.

    Asks on a thread, because a name lookup has no timeout of its own.
    """
    if hub_disabled():
        return False
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=patience):
                answers.append(True)
        except urllib.error.HTTPError:  # an error is an answer too
            answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return bool(answers and answers[0])


_REFERENCE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")


class HubUnavailable(Exception):
    """The hub cannot give these rows; the message says why, in a few words."""


@dataclass(frozen=True)
class HubRef:
    """A data set on the hub: repository id, configuration, split names, and the pinned commit."""

    id: str
    config: str | None = None
    split: str = "train"
    test_split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubRef | None:
        """Parse ``owner/name``, ``owner/name:config`` or either with ``@revision``; returns None for other text."""
        match = _REFERENCE.fullmatch(text)
        return cls(match["id"], match["config"], revision=match["revision"]) if match else None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.id}{config}" + (f"@{self.revision[:12]}" if self.revision else "")


def load_hub(ref: HubRef) -> tuple[Iterator[Row], Iterator[Row], str]:
    """Load the rows of the split and of the test split (empty if there is none), and return ``hub`` or ``hub cache``.

    Without a connection, or under ``HF_HUB_OFFLINE=1``, the cache of `datasets` is used. The cache does not distinguish
    revisions, so the caller compares row counts.

    Raises:
        HubUnavailable: neither the cache nor the hub has the rows.
    """
    reachable = hub_reachable()
    datasets = import_module("datasets")
    with _silence(datasets, offline=not reachable):
        try:
            loaded = [
                iter(datasets.load_dataset(ref.id, ref.config, split=split, revision=ref.revision))
                if split
                else iter(())
                for split in (ref.split, ref.test_split)
            ]
        except Exception as error:  # after any error of the hub's client the caller tries the next source
            if not reachable:
                raise HubUnavailable("not cached, and the hub is out of reach or switched off") from error
            raise HubUnavailable(" ".join(str(error).split())[:200] or type(error).__name__) from error
    return loaded[0], loaded[1], "hub" if reachable else "hub cache"


@contextmanager
def _silence(datasets: Any, *, offline: bool) -> Iterator[None]:
    """Silence the library's warnings in this block and, if `offline`, keep it from using the network.

    Both libraries read the environment only at import, so this sets their attributes.
    """
    constants: Any = import_module("huggingface_hub.constants")
    before = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE, datasets.logging.get_verbosity())
    datasets.logging.set_verbosity_error()
    if offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before[:2]
        datasets.logging.set_verbosity(before[2])
