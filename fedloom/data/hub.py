"""Rows from the Hugging Face hub, at a pinned revision, without ever hanging: no connection is found out in seconds.

`datasets` does the work and owns the cache. This file does not know roles or corpora; it yields rows or says why not.
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

#: Seconds after which a hub that has not answered counts as out of reach.
PATIENCE = 4.0


def switched_off() -> bool:
    """Whether the environment forbids the hub."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)


def hub_reachable(patience: float = PATIENCE) -> bool:
    """Whether the hub answers within `patience` seconds. Proxies of the environment are used.

    The question is asked on a thread because looking a name up has no timeout of its own.
    """
    if switched_off():
        return False
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=patience):
                answers.append(True)
        except urllib.error.HTTPError:  # an answer all the same
            answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return bool(answers and answers[0])


_REFERENCE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")


class HubUnavailable(Exception):
    """These rows cannot be had from the hub; the message says why, in a few words."""


@dataclass(frozen=True)
class HubRef:
    """What to load: repository id, configuration, split names, and the commit that it is pinned to."""

    id: str
    config: str | None = None
    split: str = "train"
    test_split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubRef | None:
        """``owner/name``, ``owner/name:config`` or either with ``@revision``; None where `text` is none of these."""
        match = _REFERENCE.fullmatch(text)
        return cls(match["id"], match["config"], revision=match["revision"]) if match else None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.id}{config}" + (f"@{self.revision[:12]}" if self.revision else "")


def load(ref: HubRef) -> tuple[Iterator[Row], Iterator[Row], str]:
    """The rows of the split and of the test split (none where there is no such), and ``hub`` or ``hub cache``.

    With no connection, or under ``HF_HUB_OFFLINE=1``, what `datasets` has cached is used; the cache does not tell
    revisions apart, so the caller compares row counts.

    Raises:
        HubUnavailable: not cached and not to be had.
    """
    reachable = hub_reachable()
    datasets = import_module("datasets")
    with _quiet(datasets, offline=not reachable):
        try:
            loaded = [
                iter(datasets.load_dataset(ref.id, ref.config, split=split, revision=ref.revision))
                if split
                else iter(())
                for split in (ref.split, ref.test_split)
            ]
        except Exception as error:  # whatever the hub's client raises is a reason to try the next source
            if not reachable:
                raise HubUnavailable("not cached, and the hub is out of reach or switched off") from error
            raise HubUnavailable(" ".join(str(error).split())[:200] or type(error).__name__) from error
    return loaded[0], loaded[1], "hub" if reachable else "hub cache"


@contextmanager
def _quiet(datasets: Any, *, offline: bool) -> Iterator[None]:
    """Silence the library's warnings and, if `offline`, keep it from trying the network, for the length of the block.

    Both libraries read the environment only when they are imported, hence the attributes.
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
