"""What the two halves of the conversation between server and site share: one question, one answer, and their bounds.

A question is a JSON header and bytes; who carries it there and back (the engine, or a test in one process) is a `Link`. This
file does not know which questions there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

#: Bytes of one piece of a message.
PIECE = 16 << 20


Bytes = bytes | bytearray | memoryview


#: A reason as it travels.
CODE = re.compile(r"[a-z][a-z_]{0,39}")


class Link(Protocol):
    """Asks one site one question. None where no answer came within `timeout` seconds."""

    def ask(self, site: str, header: Mapping[str, Any], data: Bytes, timeout: float) -> Answer | None: ...


@dataclass(frozen=True)
class Answer:
    """What a site said: a small JSON header, and bytes where some were asked for."""

    header: Mapping[str, Any]
    data: Bytes = b""
