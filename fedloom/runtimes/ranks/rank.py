"""The trainer's own end: it hears one question after another, alone or as one of several ranks, until nobody asks any more.

    python -m MODULE SOCKET                            one process
    python -m MODULE SOCKET RANK COUNT MEETING         one of several, which meet by the file MEETING

torch.distributed connects the ranks. They are children of whoever asks (worker.py), not of torchrun: that would be one
more process, which opens a port for anybody on the machine and whose death would leave the ranks behind. This file does
not know what is asked.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fedloom.runtimes.ranks.worker import ERROR, NO_MEMORY, end_with_parent, requests, send
from fedloom.training import parallel
from fedloom.training.parallel import Ranks


@dataclass(frozen=True)
class Place:
    """Where this process stands, as its command line says."""

    path: str
    rank: int = 0
    count: int = 1
    meeting: str = ""

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Place:
        if len(arguments) == 1:
            return cls(arguments[0])
        path, rank, count, meeting = arguments
        return cls(path, int(rank), int(count), meeting)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def joined(self, strategy: str | None, device: str) -> Ranks:
        """With the other ranks; waits for them."""
        return parallel.joined(self.rank, self.count, self.meeting, strategy, device)


#: One process, and no socket: whoever made it asks it directly.
BY_ITSELF = Place("")


def serve(place: Place, limit: int, answer: Callable[[str, bytes | bytearray], tuple[dict[str, Any], bytes]]) -> None:
    """Every rank does what is asked, and the first one says what came of it."""
    if place.count > 1:
        end_with_parent()
    for connection, header, body in requests(place.path, limit):
        reply = answer(str(header.get("kind")), body)
        if place.first:
            with contextlib.suppress(ConnectionError):  # the agent is gone: there is no next question either
                send(connection, *reply)


def end_rank(error: Exception) -> NoReturn:
    """End this rank because of an error that nobody foresaw, and with it all, which may be waiting for it in a sum.

    At once: an orderly end would wait for the others.
    """
    traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(NO_MEMORY if isinstance(error, torch.OutOfMemoryError) else ERROR)
