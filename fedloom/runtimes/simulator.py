"""Every client on one machine, in one process, one after another on one frozen base.

The base model and one adapter buffer are in memory once; a client's turn begins by copying its payload into the
buffer. Messages are really encoded and decoded, so bytes are measured and a payload that could not travel fails here
too. The simulator knows no algorithm: one `Client` plays all clients, or one trainer of several ranks does (ranked.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from fedloom.client import Client
from fedloom.runtimes import wire
from fedloom.runtimes.ranked import Ranked
from fedloom.types import Assignment, Outcome


class Simulator:
    pooled_tests = True
    virtual = True
    takes_ranks = True

    def __init__(self, client: Client | Ranked, clients: tuple[str, ...]) -> None:
        self._client = client
        self._clients = clients

    @property
    def clients(self) -> tuple[str, ...]:
        return self._clients

    def run(self, assignments: Iterable[Assignment | None]) -> Iterator[Outcome]:
        for assignment in assignments:
            if assignment is None:  # and nothing is ever under way here
                return
            message = wire.encode_assignment(assignment)
            reply = wire.encode_outcome(self._client.handle(wire.decode_assignment(message)))
            outcome = wire.decode_outcome(reply)
            cost = replace(outcome.cost, upload_bytes=len(reply), download_bytes=len(message))
            del message, reply
            outcome = replace(outcome, cost=cost)
            yield outcome
            del outcome

    def close(self) -> None:
        self._client.close()
