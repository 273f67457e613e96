"""The trainer's end of the connection: it answers requests, alone or as one of several ranks, until the agent is gone.

    python -m MODULE SOCKET                            one process
    python -m MODULE SOCKET RANK COUNT MEETING         one of several, which meet by the file MEETING

torch.distributed connects the ranks. They are children of the agent's process (worker.py), not of torchrun. torchrun
would be one more process: it opens a port to every user of the machine, and if it died the ranks would stay. This file
does not know what is requested.
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
    """The rank of this process, read from its command line."""

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
        """Connect to the other ranks; wait for them."""
        return parallel.joined(self.rank, self.count, self.meeting, strategy, device)


#: One process without a socket, which is called directly.
BY_ITSELF = Place("")


def serve(place: Place, limit: int, answer: Callable[[str, bytes | bytearray], tuple[dict[str, Any], bytes]]) -> None:
    """Answer requests: every rank does the work, and the first rank sends the answer."""
    if place.count > 1:
        end_with_parent()
    for connection, header, body in requests(place.path, limit):
        reply = answer(str(header.get("kind")), body)
        if place.first:
            with contextlib.suppress(ConnectionError):  # the agent is gone: there is no next request either
                send(connection, *reply)


def end_rank(error: Exception) -> NoReturn:
    """End this rank after an unexpected error. All other ranks end too, because they may wait for it in a reduction.

    The process ends at once: a normal exit would wait for the others.
    """
    traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(NO_MEMORY if isinstance(error, torch.OutOfMemoryError) else ERROR)
