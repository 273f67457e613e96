"""The trainer as a process of its own: it holds the model, outlives rounds, and may die without taking its site down.

    site's agent ── Unix socket ── python -m fedloom.site SOCKET      (the model, the data, the client)

Both ends speak frames: a short JSON header and bytes, which for work are the messages of wire.py. The agent asks, the
trainer answers, one thing at a time. The socket lies in a folder that only this user may enter; when the agent goes,
the trainer reads the end of the socket and ends as well. This file does not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
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

#: Seconds that a trainer has to import its libraries and connect.
START = 120.0


class WorkerLost(Exception):
    """The trainer ended; `how` names the signal or exit code."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the trainer ended ({how})")
        self.how = how


class WorkerLate(Exception):
    """The trainer did not answer in time, and was ended."""


class Stopped(Exception):
    """The work was called off, and the trainer ended with it."""


def send(connection: socket.socket, header: Mapping[str, Any], body: bytes | bytearray = b"") -> None:
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header of a frame has {len(text)} bytes; at most {MAX_HEADER} are sent")
    connection.sendall(struct.pack("<IQ", len(text), len(body)) + text)
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
    """A trainer's process, as the agent holds it.

    Args:
        command: what starts it; the socket's path is added. A cluster's is `torch.distributed.run` with its ranks.
        log: the file that its output goes to.
        limit: bytes that one answer may have.
    """

    def __init__(self, command: Sequence[str], log: Path, limit: int) -> None:
        self._limit = limit
        self._folder = Path(
            tempfile.mkdtemp(prefix="fedloom-")
        )  # 0700, and a short path: a socket's may have 107 bytes
        self._connection: socket.socket | None = None
        path = str(self._folder / "trainer")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(path)
            listener.listen(1)
            listener.settimeout(0.1)
            with log.open("ab") as out:
                self._process = subprocess.Popen([*command, path], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            until = time.monotonic() + START
            while self._connection is None:
                try:
                    self._connection, _ = listener.accept()
                except TimeoutError:
                    if self._process.poll() is not None or time.monotonic() > until:
                        self.close()
                        raise WorkerLost(self._how()) from None
        self._connection.settimeout(0.1)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(
        self,
        header: Mapping[str, Any],
        body: bytes | bytearray,
        deadline: float | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[dict[str, Any], bytes | bytearray]:
        """The trainer's answer. After an exception the process is gone, and another has to be started.

        Raises:
            WorkerLost: it ended before it answered.
            WorkerLate: `deadline` seconds are over.
            Stopped: `stopped()` became true.
        """
        assert self._connection is not None
        until = None if deadline is None else time.monotonic() + deadline

        def step() -> None:
            if stopped():
                raise Stopped
            if until is not None and time.monotonic() > until:
                raise WorkerLate
            if not self.alive:
                raise EOFError

        try:
            self._connection.settimeout(None)
            send(self._connection, header, body)
            self._connection.settimeout(0.1)
            return receive(self._connection, self._limit, step)
        except (EOFError, OSError, ValueError):
            self.close()
            raise WorkerLost(self._how()) from None
        except (WorkerLate, Stopped):
            self.close()
            raise

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._connection is not None:
            self._connection.close()
        if self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.3)  # it ended already, or ends with the socket
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _how(self) -> str:
        code = self._process.returncode
        if code is None:
            return "it did not connect"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def command(ranks: int = 1) -> list[str]:
    """What starts a site's trainer."""
    assert ranks == 1, "more ranks are started by torch.distributed.run"
    return [sys.executable, "-m", "fedloom.site"]


def requests(path: str, limit: int) -> Iterator[tuple[socket.socket, dict[str, Any], bytearray]]:
    """The trainer's end: one question after another until the agent is gone."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.connect(path)
        while True:
            try:
                header, body = receive(connection, limit)
            except (EOFError, ConnectionError):
                shutil.rmtree(Path(path).parent, ignore_errors=True)  # where the agent was killed
                return
            yield connection, header, body


def end_with_parent() -> None:
    """An engine's job ends when its service is gone: nobody could reach it, and it would hold folders and memory."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, name="parent", daemon=True).start()
