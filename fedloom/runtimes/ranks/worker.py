"""The trainer as a process of its own, or several: it holds the model, outlives rounds, and may die without its site.

    site's agent ─┬─ Unix socket ── python -m fedloom.runtimes.sites.trainer SOCKET  (model, data, client)
                  └─ Unix socket ── its other ranks, where a client has some (training/parallel.py)

Both ends speak frames: a short JSON header and bytes, which for work are the messages of messages/wire.py. The agent
asks, the trainer answers, one thing at a time. Every rank hears each question on a socket of its own and the first
one answers, so ranks that wait need nothing of each other; where one dies, all are ended, since the others would wait
for it. The sockets lie in a folder that only this user may enter, as does the file by which ranks find each other;
when the agent goes, a rank reads the end of its socket and ends as well. This file does not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_HEADER = 1 << 16


#: Seconds that a trainer has to import its libraries and connect; on a machine with much else to do that is minutes.
START = 300.0


#: Exit codes of a trainer: its machine's memory is full, and an error that nobody foresaw.
NO_MEMORY, ERROR = 12, 70


class WorkerLost(Exception):
    """The trainer ended; `how` names the signal or exit code.

    Attributes:
        error: whether it ended by an error of its own, which its log tells, and not from outside.
    """

    def __init__(self, how: str, error: bool = False) -> None:
        super().__init__(f"the trainer ended ({how})")
        self.how = how
        self.error = error


class WorkerLate(Exception):
    """The trainer did not answer in time, and was ended."""


class Stopped(Exception):
    """The work was called off, and the trainer ended with it."""


def send(connection: socket.socket, header: Mapping[str, Any], body: bytes | bytearray | memoryview = b"") -> None:
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header of a frame has {len(text)} bytes; at most {MAX_HEADER} are sent")
    connection.sendall(struct.pack("<IQ", len(text), len(body)) + text)
    if body:  # the other end may have what it wanted, and be gone
        connection.sendall(body)


def receive(
    connection: socket.socket, limit: int, step: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], bytearray]:
    """One frame. `step` is called while nothing comes, and may raise.

    Raises:
        EOFError: the other end is gone.
        ValueError: a frame over its bounds.
    """
    lengths = _exactly(connection, 12, step)
    header_length, body_length = struct.unpack("<IQ", lengths)
    if header_length > MAX_HEADER or body_length > limit:
        raise ValueError(
            f"a frame announces {header_length} + {body_length} bytes; at most {MAX_HEADER} + {limit} are taken"
        )
    header = json.loads(_exactly(connection, header_length, step))
    return header, _exactly(connection, body_length, step)


def _exactly(connection: socket.socket, count: int, step: Callable[[], None]) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        try:
            got = connection.recv_into(view[done:])
        except TimeoutError:
            step()
            continue
        if not got:
            raise EOFError("the other end of the socket is gone")
        done += got
    return data


class Worker:
    """A trainer's processes, as the agent holds them. Raises WorkerLost or OSError where they do not come up.

    Args:
        command: what starts one; the socket's path is added, and for one of several ranks its number, their count and
            the file by which they meet.
        log: the file that their output goes to.
        limit: bytes that one answer may have.
        ranks: how many processes.
    """

    def __init__(self, command: Sequence[str], log: Path, limit: int, ranks: int = 1) -> None:
        self._limit = limit
        # 0700, and a short path: a socket's may have 107 bytes
        self._folder = Path(tempfile.mkdtemp(prefix="fedloom-"))
        self._connections: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start(command, log, ranks)
        except OSError:  # a full disk, no more processes
            self.close()
            raise

    def _start(self, command: Sequence[str], log: Path, ranks: int) -> None:
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(log.open("ab"))
            listeners = []
            for rank in range(ranks):
                listener = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
                path = str(self._folder / f"trainer-{rank}")
                listener.bind(path)
                listener.listen(1)
                listener.settimeout(0.1)
                listeners.append(listener)
                place = [str(rank), str(ranks), str(self._folder / "meeting")] if ranks > 1 else []
                self._processes.append(
                    subprocess.Popen([*command, path, *place], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
                )
            until = time.monotonic() + START
            for listener in listeners:
                self._connections.append(self._accepted(listener, until))

    def _accepted(self, listener: socket.socket, until: float) -> socket.socket:
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if not self.alive or time.monotonic() > until:
                    raise self._lost() from None
            else:
                connection.settimeout(0.1)
                return connection

    @property
    def pid(self) -> int:
        """The first rank's."""
        return self._processes[0].pid

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(p.pid for p in self._processes)

    @property
    def alive(self) -> bool:
        """Whether all of it is."""
        return all(p.poll() is None for p in self._processes)

    def ask(
        self,
        header: Mapping[str, Any],
        body: bytes | bytearray | memoryview,
        deadline: float | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[dict[str, Any], bytes | bytearray]:
        """The trainer's answer. After an exception its processes are gone, and others have to be started.

        Raises:
            WorkerLost: one of them ended before the answer was there.
            WorkerLate: `deadline` seconds are over.
            Stopped: `stopped()` became true.
        """
        until = None if deadline is None else time.monotonic() + deadline

        def step() -> None:
            if stopped():
                raise Stopped
            if until is not None and time.monotonic() > until:
                raise WorkerLate
            if not self.alive:
                raise EOFError

        try:
            for connection in self._connections:
                connection.settimeout(None)
                send(connection, header, body)
                connection.settimeout(0.1)
            return receive(self._connections[0], self._limit, step)
        except (EOFError, OSError, ValueError):
            raise self._lost() from None
        except (WorkerLate, Stopped):
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for connection in self._connections:
            connection.close()
        until = time.monotonic() + 0.3  # they ended already, or end with their sockets
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, until - time.monotonic()))
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _lost(self) -> WorkerLost:
        """End what is left, and say how the first of them ended that did so by itself."""
        until = time.monotonic() + 1.0  # a rank that sees another one's end may end a moment before that is known
        while self.alive and time.monotonic() < until:
            time.sleep(0.02)
        ends = {rank: code for rank, p in enumerate(self._processes) if (code := p.poll()) is not None}
        self.close()
        if not ends:
            return WorkerLost("it did not answer" if self._connections else "it did not connect")
        rank = min(
            ends, key=lambda r: (ends[r] >= 0, ends[r] != NO_MEMORY, r)
        )  # a signal explains what follows from it
        code = ends[rank]
        how = signal.Signals(-code).name if code < 0 else "out of memory" if code == NO_MEMORY else f"exit code {code}"
        return WorkerLost(f"rank {rank}: {how}" if len(self._processes) > 1 else how, error=code == ERROR)


def command() -> list[str]:
    """What starts a site's trainer."""
    return [sys.executable, "-m", "fedloom.runtimes.sites.trainer"]


def requests(path: str, limit: int) -> Iterator[tuple[socket.socket, dict[str, Any], bytearray]]:
    """The trainer's end: one question after another until the agent is gone."""
    end_with_agent()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.connect(path)
        while True:
            try:
                header, body = receive(connection, limit)
            except (EOFError, ConnectionError):
                shutil.rmtree(Path(path).parent, ignore_errors=True)  # where the agent was killed
                return
            yield connection, header, body


def end_with_agent() -> None:
    """A trainer that is stopped, or deep in its work, does not see that its socket was closed: the kernel ends it."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def end_with_parent() -> None:
    """An engine's job ends when its service is gone: nobody could reach it, and it would hold folders and memory."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, name="parent", daemon=True).start()
