"""Messages that wait to be sent piece by piece: in memory while they are few and small, else in files without a name.

A message is encoded when work is dispatched, because the next round changes its tensors. Until a site has it, memory
would need a copy for each site: a second one of an emulator of 2 GB, and a hundred of 10 MB for a hundred sites. This
file does not know what a message contains.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from fedloom.messages.wire import Stream
from fedloom.runtimes.sites.link import PIECE

#: The most bytes of messages that wait in memory; further messages wait on disk.
IN_MEMORY = 256 << 20


class Outgoing:
    """Stores messages. `folder` has those on disk; None uses the system's folder for temporary files."""

    def __init__(self, folder: Path | None = None, most: int = IN_MEMORY) -> None:
        self._folder = folder
        self._most = most
        self._held = 0
        self._lock = threading.Lock()

    def take(self, stream: Stream) -> Message:
        """Store the message as it is now. Raises OSError if the disk is full."""
        with self._lock:
            in_memory = self._held + stream.total <= self._most
            self._held += stream.total if in_memory else 0
        if in_memory:
            return Message(stream.join(), done=self._let_go)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
            for chunk in stream.chunks:
                while chunk:
                    chunk = chunk[file.write(chunk) :]
            return Message(file=os.dup(file.fileno()), size=stream.total)

    def _let_go(self, size: int) -> None:
        with self._lock:
            self._held -= size


class Message:
    """A message that waits; `len` is its size in bytes. Close it once it is sent."""

    def __init__(
        self, data: bytes = b"", file: int | None = None, size: int = 0, done: Callable[[int], None] = lambda size: None
    ) -> None:
        self._data: bytes | None = data
        self._file = file
        self._size = len(data) if file is None else size
        self._done = done

    def __len__(self) -> int:
        return self._size

    def piece(self, offset: int) -> bytes:
        """Return the bytes from `offset` on, at most `PIECE` of them."""
        assert self._data is not None, "the message is closed"
        if self._file is None:
            return self._data[offset : offset + PIECE]
        parts, end = [b""], min(offset + PIECE, self._size)
        while offset < end:
            parts.append(os.pread(self._file, end - offset, offset))
            if not parts[-1]:
                raise OSError("a message that waited on disk is shorter than it was")
            offset += len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        if self._data is None:
            return
        self._data = None
        if self._file is not None:
            os.close(self._file)
        self._done(self._size)
