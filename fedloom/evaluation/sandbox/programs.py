"""One program that a model wrote, what it may take, and how it is watched from its start to its end.

This file does not know what holds the program (bubblewrap.py, execution.py) nor its language.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

#: How often a running program is looked at, in seconds.
LOOK = 0.02


#: Where a program finds its files, and where it may write.
SOURCES, SCRATCH = "/program", "/tmp"


#: The Python that runs this, outside of any virtual environment: what a cage shows is this one.
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))


End = Literal["ended", "timeout", "memory", "processes", "output"]


@dataclass(frozen=True)
class Limits:
    """What one program may take.

    Attributes:
        seconds: by the clock, from its start, compiling included.
        memory: bytes that all its processes hold together.
        processes: at the same time, threads counted.
        scratch: bytes that it may write.
        output: bytes that it may print; what is over is not kept.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    processes: int = 128
    scratch: int = 64 << 20
    output: int = 64 << 10


@dataclass(frozen=True)
class Program:
    """What is to be run: files (name → text) and the command that runs them in their folder, with /tmp to write in."""

    files: Mapping[str, str]
    command: Sequence[str]
    limits: Limits = Limits()


@dataclass(frozen=True)
class Ran:
    """How a program ended. `code`: its exit code, negative for a signal; None where the cage ended it."""

    end: End
    code: int | None
    output: str

    @property
    def well(self) -> bool:
        return self.end == "ended" and self.code == 0


class Cage(Protocol):
    """Runs a program and outlives it (bubblewrap.py, execution.py)."""

    name: str

    #: Where a language's tools have to be, for a sentence.
    tools_at: str

    def run(self, program: Program) -> Ran:
        """Returns within the program's limits, whatever it does."""


@contextlib.contextmanager
def folder(program: Program) -> Iterator[Path]:
    """The program's files, readable by whoever it runs as."""
    with tempfile.TemporaryDirectory(prefix="fedloom-program-") as name:
        folder = Path(name)
        for path, text in program.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8", errors="replace")
        for place in (folder, *folder.rglob("*")):  # whatever the user's umask says
            place.chmod(0o755 if place.is_dir() else 0o644)
        yield folder


def start(argv: Sequence[str], **how: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **how,
    )


def watched(
    process: subprocess.Popen[bytes], limits: Limits, usage: Callable[[], tuple[int, int]], end: Callable[[], None]
) -> Ran:
    """Read what the program prints until it ends or has to.

    Args:
        usage: its processes and the bytes that they hold.
        end: ends all of it.
    """
    assert process.stdout is not None
    over: End = "ended"
    kept = bytearray()
    deadline = time.monotonic() + limits.seconds
    with process, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        reading = True
        while process.poll() is None and over == "ended":
            if reading and selector.select(LOOK):
                piece = os.read(process.stdout.fileno(), 1 << 16)
                reading = bool(piece)
                kept += piece
            elif not reading:
                time.sleep(LOOK)
            over = _over(limits, len(kept), deadline, usage())
        if over != "ended":
            end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10.0)
        if process.poll() is None:
            process.kill()
            end()  # of what there was not yet when it was first said, as of a container that had not begun
        while over == "ended" and reading and len(kept) <= limits.output and selector.select(0):
            piece = os.read(process.stdout.fileno(), 1 << 16)
            reading = bool(piece)
            kept += piece
    if over == "ended" and len(kept) > limits.output:
        over = "output"
    text = bytes(kept[: limits.output]).decode(errors="replace")
    return Ran(over, process.returncode if over == "ended" else None, text)


def _over(limits: Limits, printed: int, deadline: float, usage: tuple[int, int]) -> End:
    processes, held = usage
    if printed > limits.output:
        return "output"
    if time.monotonic() > deadline:
        return "timeout"
    if processes > limits.processes:
        return "processes"
    return "memory" if held > limits.memory else "ended"


def prlimit(limits: Limits) -> list[str]:
    """What the kernel bounds for each process by itself, so that it cannot run away between two looks.

    `data`, not `as`: a Java or a JavaScript machine reserves far more addresses than it uses. Processes are counted for
    a user, not for a program, and not at all for root: the bound is a brake, what counts them is bubblewrap.py.
    """
    return [
        "prlimit", f"--data={limits.memory}", f"--fsize={limits.scratch}", f"--cpu={int(limits.seconds) * 4 + 4}",
        "--core=0", "--nofile=256", f"--nproc={max(1024, 4 * limits.processes)}", "--",
    ]  # fmt: skip
