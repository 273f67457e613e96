"""One program that a model wrote: its limits, its outcome, and the loop that watches it.

This file does not know the sandbox (bubblewrap.py, execution.py) or the program's language.
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

#: Time between two checks of a running program.
POLL_SECONDS = 0.02


#: The folder of a program's files, and the folder that it may write to.
SOURCES, SCRATCH = "/program", "/tmp"


#: The Python that runs this, outside of any virtual environment: the one that a sandbox contains.
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))


End = Literal["ended", "timeout", "memory", "processes", "output"]


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Attributes:
        seconds: wall time from its start, compiling included.
        memory: bytes of all its processes together.
        processes: at the same time, threads included.
        scratch: bytes that it may write.
        output: bytes that it may print; the rest is dropped.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    processes: int = 128
    scratch: int = 64 << 20
    output: int = 64 << 10


@dataclass(frozen=True)
class Program:
    """Files (name → text), and the command that runs them in their folder. The program may write to /tmp."""

    files: Mapping[str, str]
    command: Sequence[str]
    limits: Limits = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `code`: its exit code, negative for a signal; None where a limit ended it."""

    end: End
    code: int | None
    output: str

    @property
    def succeeded(self) -> bool:
        return self.end == "ended" and self.code == 0


class Sandbox(Protocol):
    """Runs a program within its limits (bubblewrap.py, execution.py)."""

    name: str

    #: Where a language's tools have to be, for error messages.
    tools_at: str

    def run(self, program: Program) -> Outcome:
        """Run the program; returns within its time limit, whatever it does."""


@contextlib.contextmanager
def program_folder(program: Program) -> Iterator[Path]:
    """Write the program's files to a temporary folder that every user may read."""
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


def watch(
    process: subprocess.Popen[bytes], limits: Limits, usage: Callable[[], tuple[int, int]], end: Callable[[], None]
) -> Outcome:
    """Read the program's output until it ends or exceeds a limit, which ends it.

    Args:
        usage: returns its number of processes and their bytes of memory.
        end: ends all its processes.
    """
    assert process.stdout is not None
    over: End = "ended"
    kept = bytearray()
    deadline = time.monotonic() + limits.seconds
    with process, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        reading = True
        while process.poll() is None and over == "ended":
            if reading and selector.select(POLL_SECONDS):
                piece = os.read(process.stdout.fileno(), 1 << 16)
                reading = bool(piece)
                kept += piece
            elif not reading:
                time.sleep(POLL_SECONDS)
            over = _exceeded_limit(limits, len(kept), deadline, usage())
        if over != "ended":
            end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10.0)
        if process.poll() is None:
            process.kill()
            end()  # again: a container may not have started yet at the first call
        while over == "ended" and reading and len(kept) <= limits.output and selector.select(0):
            piece = os.read(process.stdout.fileno(), 1 << 16)
            reading = bool(piece)
            kept += piece
    if over == "ended" and len(kept) > limits.output:
        over = "output"
    text = bytes(kept[: limits.output]).decode(errors="replace")
    return Outcome(over, process.returncode if over == "ended" else None, text)


def _exceeded_limit(limits: Limits, printed: int, deadline: float, usage: tuple[int, int]) -> End:
    processes, held = usage
    if printed > limits.output:
        return "output"
    if time.monotonic() > deadline:
        return "timeout"
    if processes > limits.processes:
        return "processes"
    return "memory" if held > limits.memory else "ended"


def prlimit(limits: Limits) -> list[str]:
    """Return the `prlimit` command: the kernel's own limits for each process, which also hold between two checks.

    `data`, not `as`: a Java or a JavaScript machine reserves far more addresses than it uses. The kernel counts processes
    by user, not by program, and not at all for root. So that limit is only a brake; bubblewrap.py counts processes.
    """
    return [
        "prlimit", f"--data={limits.memory}", f"--fsize={limits.scratch}", f"--cpu={int(limits.seconds) * 4 + 4}",
        "--core=0", "--nofile=256", f"--nproc={max(1024, 4 * limits.processes)}", "--",
    ]  # fmt: skip
