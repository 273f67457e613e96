"""The trainer as one child process or several: it keeps the model between rounds, and the site survives its death.

    site's agent ─┬─ Unix socket ── python -m fedloom.runtimes.sites.trainer SOCKET  (model, data, client)
                  └─ Unix socket ── its other ranks, where a client has some (training/parallel.py)

Both ends send frames: a short JSON header and bytes. For work, the bytes are the messages of messages/wire.py. The agent
sends one request at a time, and the trainer answers. Every rank receives each request on its own socket, and the first
rank answers, so ranks do not wait for each other between requests. If one rank dies, all are ended, because the others
would wait for it. The sockets and the file by which ranks find each other are in a folder that only this user may enter.
When the agent ends, a rank reads the end of its socket and ends too. This file does not know what the bytes mean.
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


#: Seconds that a trainer has to import its libraries and connect; on a busy machine this takes minutes.
START = 300.0


#: Exit codes of a trainer: out of memory, and an unexpected error.
NO_MEMORY, ERROR = 12, 70


class WorkerLost(Exception):
    """The trainer ended; `how` names the signal or exit code.

    Attributes:
        error: whether an error in its own code ended it. The trainer's log has that error.
    """

    def __init__(self, how: str, error: bool = False) -> None:
        super().__init__(f"the trainer ended ({how})")
        self.how = how
        self.error = error


class WorkerLate(Exception):
    """The trainer did not answer in time, and was ended."""


class Stopped(Exception):
    """The work was cancelled, and the trainer was ended."""


def send(connection: socket.socket, header: Mapping[str, Any], body: bytes | bytearray | memoryview = b"") -> None:
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header of a frame has {len(text)} bytes; at most {MAX_HEADER} are sent")
    connection.sendall(struct.pack("<IQ", len(text), len(body)) + text)
    if body:  # an empty send could fail after the other end has closed
        connection.sendall(body)


def receive(
    connection: socket.socket, limit: int, step: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], bytearray]:
    """Receive one frame. `step` is called while no bytes arrive, and may raise.

    Raises:
        EOFError: the other end is gone.
        ValueError: the frame is larger than `limit` or `MAX_HEADER`.
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
    """Starts and controls a trainer's processes. Raises WorkerLost or OSError if they do not start.

    Args:
        command: starts one process. The socket's path is added; with several ranks also the rank, their count and the
            file by which they meet.
        log: the file for their output.
        limit: the most bytes of one answer.
        ranks: the number of processes.
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
        """The process id of the first rank."""
        return self._processes[0].pid

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(p.pid for p in self._processes)

    @property
    def alive(self) -> bool:
        """Whether all processes run."""
        return all(p.poll() is None for p in self._processes)

    def ask(
        self,
        header: Mapping[str, Any],
        body: bytes | bytearray | memoryview,
        deadline: float | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[dict[str, Any], bytes | bytearray]:
        """Send a request and return the answer. After an exception the processes are gone; start a new `Worker`.

        Raises:
            WorkerLost: a process ended before the answer arrived.
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
        """End the processes at once."""
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
        """End the remaining processes, and report how the first one ended."""
        until = time.monotonic() + 1.0  # a rank that notices another's end may be reaped first
        while self.alive and time.monotonic() < until:
            time.sleep(0.02)
        ends = {rank: code for rank, p in enumerate(self._processes) if (code := p.poll()) is not None}
        self.close()
        if not ends:
            return WorkerLost("it did not answer" if self._connections else "it did not connect")
        rank = min(ends, key=lambda r: (ends[r] >= 0, ends[r] != NO_MEMORY, r))  # a signal is the cause of other exits
        code = ends[rank]
        how = signal.Signals(-code).name if code < 0 else "out of memory" if code == NO_MEMORY else f"exit code {code}"
        return WorkerLost(f"rank {rank}: {how}" if len(self._processes) > 1 else how, error=code == ERROR)


def command() -> list[str]:
    """Return the command that starts a site's trainer."""
    return [sys.executable, "-m", "fedloom.runtimes.sites.trainer"]


def requests(path: str, limit: int) -> Iterator[tuple[socket.socket, dict[str, Any], bytearray]]:
    """Yield the agent's requests, in the trainer's process, until the agent is gone."""
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
    """Let the kernel end this process with the agent. A busy or stopped trainer does not notice a closed socket."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def end_with_parent() -> None:
    """End this process when its parent is gone: nobody could reach it, and it would keep folders and memory."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, name="parent", daemon=True).start()
