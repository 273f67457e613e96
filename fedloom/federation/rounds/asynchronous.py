"""Rounds without a barrier: work is kept in flight, and a round is over when enough updates have arrived.

    a slot is free → ask an idle client, from the model as it is now
    an outcome arrives → hand it on, its slot is free
    `buffer` usable updates → the coordinator aggregates them, and the model is one version newer

Version v is the model after v rounds. An assignment of round r starts from version r − 1, and its outcome says r again:
so an update that arrives in round r' is r' − r versions old, and nobody else has to remember where it started.

A client is in flight at most once, and starts from a version at most once. (A client that came back waits for the next
version rather than train on the same model twice; where clients are many, the next idle one takes its slot.) So client
and round name a piece of work: a client's state, data and schedule are keyed as in synchronous rounds. When nobody is
in flight and nobody may be asked, the round has what it has.

In virtual time (virtual_time.py) work is done as soon as it is sent, and its outcome waits on disk until its virtual
time of arrival; what waits is part of the checkpoint. In real time outcomes are taken as the runtime hands them over,
and work that was in flight when the server died is sent again. This file knows no algorithm and no message.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from fedloom.common.files import folder_name, link_file, write_bytes
from fedloom.federation.rounds.collection import Accept, below_quorum
from fedloom.federation.rounds.dispatcher import Dispatcher
from fedloom.federation.rounds.schedule import ATTEMPTS, Schedule
from fedloom.federation.rounds.virtual_time import VirtualTime
from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import VANISHED, Assignment, Cost, Failure, Outcome, Payload, Update


@dataclass(frozen=True)
class Waiting:
    """An outcome that is there and has not arrived yet; an update's payload lies in `file`."""

    arrives: float
    outcome: Outcome
    file: str | None


class Buffer:
    """Updates whose payloads lie on disk; iterated, they come in client order, a client's older one first.

    Args:
        order: all clients, in their fixed order.
        folder: where payloads lie; nothing is left in it at the end of the block.
    """

    def __init__(self, order: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._position = {client: i for i, client in enumerate(order)}
        self._scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".buffer-")
        self._held: list[tuple[int, int, Update]] = []

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._scratch.cleanup()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, update: Update) -> None:
        key = (self._position[update.client], update.round)
        self._file(*key).write_bytes(to_bytes(update.payload))
        self._held.append((*key, replace(update, payload=Payload())))

    def __iter__(self) -> Iterator[Update]:
        """Each update once, with its payload."""
        for client, round, update in sorted(self._held, key=lambda item: item[:2]):
            path = self._file(client, round)
            yield replace(update, payload=from_bytes(path.read_bytes()))
            path.unlink()

    def _file(self, client: int, round: int) -> Path:
        return Path(self._scratch.name, f"{client}-{round}")


class AsynchronousRounds:
    """Who works on what, and which outcomes have arrived.

    The runtime's `run` is called once, and continues from round to round.

    Args:
        buffer: how many usable updates make a round.
        folder: where outcomes wait; emptied here and at the end.
    """

    def __init__(self, dispatcher: Dispatcher, schedule: Schedule, buffer: int, folder: Path) -> None:
        self.buffer = buffer
        self._dispatcher, self._schedule, self._folder = dispatcher, schedule, folder
        self._virtual = dispatcher.virtual_time
        self.now = None if self._virtual is None else 0.0
        self._round = 0
        self._queue: deque[str] = deque()  # who may still be asked to start from this version, in the order of asking
        self._position = {client: i for i, client in enumerate(schedule.training)}
        self._working: dict[str, int] = {}  # client → round of what was sent and is not back
        self._waiting: dict[str, Waiting] = {}
        self._stream: Iterator[Outcome] | None = None
        shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------------ a round

    def begin(self, round: int) -> list[str]:
        """A new version is there, and everybody may start from it. Returns those in flight once free slots are given."""
        self._round = round
        busy = self._busy()
        fewest = self._schedule.federation.min_clients
        self._queue = deque(self._schedule.queue(round, max(0, fewest - len(busy))))
        idle = (client for client in self._queue if client not in busy)
        asked = islice(idle, max(0, self._schedule.sampled() - len(busy)))
        return sorted({*busy, *asked}, key=self._position.__getitem__)

    def updates(self, accept: Accept) -> Iterator[Update]:
        """The first `buffer` updates that `accept` takes, then in client order, a client's older one first.

        All of them are there before the first is handed over; until then their payloads lie under `folder`.
        """
        fewest, arrivals = self._schedule.federation.min_clients, self._arrivals()
        with Buffer(self._schedule.training, self._folder) as buffer:
            self._tick(0)
            while len(buffer) < self.buffer and (outcome := next(arrivals, None)) is not None:
                update = accept(outcome)
                del outcome
                if update is not None:
                    buffer.add(update)
                    self._tick(len(buffer))
                del update
            arrivals.close()  # it would hold on to the last outcome
            if len(buffer) < fewest:
                raise below_quorum(self._round, len(buffer), fewest)
            yield from buffer

    def about(self, outcome: Outcome) -> dict[str, Any]:
        """What an event says of the outcome that arrived last."""
        arrived = None if self.now is None else round(self.now, 3)
        return {"staleness": self._round - outcome.round, "arrived": arrived}

    def close(self) -> None:
        """The run is over. Work in flight is given up; the last checkpoint has what waited."""
        stream, self._stream = self._stream, None
        if stream is not None and hasattr(stream, "close"):
            stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tick(self, done: int) -> None:
        self._dispatcher.tick("train", self._round, done, self.buffer)

    # ------------------------------------------------------------------ sending and receiving

    def _busy(self) -> set[str]:
        return self._working.keys() | self._waiting.keys()

    def _free(self) -> str | None:
        """Return the next client to get work; None if every slot is taken or no client is idle."""
        busy = self._busy()
        if len(busy) >= self._schedule.sampled():
            return None
        return next((client for client in self._queue if client not in busy), None)

    def _assignments(self) -> Iterator[Assignment | None]:
        """What the runtime pulls while it is waited for: work for each free slot, then None."""
        while True:
            client = self._free()
            if client is None:
                yield None
                continue
            self._queue.remove(client)
            self._working[client] = self._round
            yield self._dispatcher.assignment(client, "train", self._round)

    def _arrivals(self) -> Generator[Outcome]:
        """Outcomes as they arrive, for as long as any can. Below quorum, clients that vanished get work again."""
        fewest, usable = self._schedule.federation.min_clients, 0
        gone: list[Failure] = []
        for attempt in range(ATTEMPTS):
            while self._busy() or self._free():
                outcome = self._received() if self._virtual is None else self._arrived(self._virtual)
                of_now = outcome.round == self._round
                if isinstance(outcome, Failure) and outcome.reason in VANISHED and of_now and usable < fewest:
                    gone.append(outcome)
                    continue
                usable += isinstance(outcome, Update)
                if usable >= fewest:  # no retry is needed
                    yield from gone
                    gone = []
                yield outcome
                del outcome
            if not gone:
                return
            if attempt + 1 < ATTEMPTS:
                self._queue, gone = deque(f.client for f in gone), []
        yield from gone

    def _received(self) -> Outcome:
        """The next outcome that the runtime hands over."""
        self._stream = self._stream or self._dispatcher.received(self._assignments(), "train")
        outcome = next(self._stream, None)
        if outcome is None:
            raise RuntimeError(f"the runtime ended without an outcome for {sorted(self._working)}")
        client, round = outcome.client, outcome.round
        asked = self._working.pop(client, None)
        if asked is None:
            return Failure(client, round, "unexpected", "nothing was asked of this client", outcome.cost)
        if round != asked:
            detail = f"the client answers round {round} where {asked} was asked"
            return Failure(client, asked, "bad_payload", detail, outcome.cost)
        return outcome

    def _arrived(self, virtual: VirtualTime) -> Outcome:
        """The next outcome in virtual time: all that is sent is done first, then the earliest is taken."""
        while self._working or self._free():
            outcome = self._received()
            arrives = (self.now or 0.0) + virtual.took(outcome.client)
            self._waiting[outcome.client] = self._kept(outcome, arrives)
        first = min(self._waiting.values(), key=lambda w: (w.arrives, w.outcome.round, w.outcome.client))
        del self._waiting[first.outcome.client]
        self.now = first.arrives
        if first.file is None or isinstance(first.outcome, Failure):
            return first.outcome
        path = self._folder / first.file
        outcome = replace(first.outcome, payload=from_bytes(path.read_bytes()))
        path.unlink()
        return outcome

    def _kept(self, outcome: Outcome, arrives: float) -> Waiting:
        if isinstance(outcome, Failure):
            return Waiting(arrives, outcome, None)
        name = f"{outcome.round:04d}-{folder_name(outcome.client)}.safetensors"
        write_bytes(self._folder / name, to_bytes(outcome.payload))
        return Waiting(arrives, replace(outcome, payload=Payload()), name)

    # ------------------------------------------------------------------ checkpoints

    def notes(self) -> dict[str, Any]:
        """The clock and what waits, as JSON."""
        return {"now": self.now, "waiting": [_described(w) for w in self._waiting.values()]}

    def files(self) -> dict[str, Path]:
        """The payloads that wait."""
        return {w.file: self._folder / w.file for w in self._waiting.values() if w.file}

    def load(self, notes: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """Resume from `notes` and `files` of a checkpoint. In real time, work that was in flight is sent again."""
        if self._virtual is None:
            return
        self.now = notes["now"]
        for name, path in files.items():
            link_file(path, self._folder / name)
        waiting = [_restored(values) for values in notes["waiting"]]
        self._waiting = {w.outcome.client: w for w in waiting}


def _described(waiting: Waiting) -> dict[str, Any]:
    values = asdict(waiting)
    values["outcome"].pop("payload", None)
    return values


def _restored(values: Mapping[str, Any]) -> Waiting:
    outcome = {**values["outcome"], "cost": Cost(**values["outcome"]["cost"])}
    failed = "reason" in outcome
    made: Outcome = Failure(**outcome) if failed else Update(**outcome, payload=Payload())
    return Waiting(values["arrives"], made, values["file"])
