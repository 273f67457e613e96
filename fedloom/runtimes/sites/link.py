"""The types that server and site share: one request, one answer, and their bounds.

A request is a JSON header and bytes. A `Link` carries it and its answer: the engine, or a test in one process. This file
does not know which requests there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

#: Bytes of one piece of a message.
PIECE = 16 << 20


Bytes = bytes | bytearray | memoryview


#: The form of a failure's code in a message.
CODE = re.compile(r"[a-z][a-z_]{0,39}")


class Link(Protocol):
    """Sends one request to one site. Returns None if no answer came within `timeout` seconds."""

    def ask(self, site: str, header: Mapping[str, Any], data: Bytes, timeout: float) -> Answer | None: ...


@dataclass(frozen=True)
class Answer:
    """A site's answer: a small JSON header, and bytes if the request asks for them."""

    header: Mapping[str, Any]
    data: Bytes = b""
