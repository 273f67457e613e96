"""Run a program in a sandbox of Linux namespaces (`bwrap`) and count its use from outside.

The program sees the system's own programs read-only, a /tmp of a bounded size, no network, no other process and no file
of the user. Its processes and their memory are counted through the sandbox's own /proc. When the sandbox's first process
ends, the kernel ends all others in it. This file does not know what the program is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import struct
import sys
from pathlib import Path

from fedloom.evaluation.sandbox.programs import (
    SCRATCH,
    SOURCES,
    Limits,
    Outcome,
    Program,
    prlimit,
    program_folder,
    start,
    watch,
)

#: The machine's paths that a program in the sandbox sees, read-only, where they exist.
SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/java-11-openjdk", "/etc/java-17-openjdk", "/etc/java-21-openjdk", "/etc/java-25-openjdk",
)  # fmt: skip


class Bubblewrap:
    """Linux namespaces through `bwrap`, and util-linux's `prlimit` for the kernel's own limits."""

    name = "bubblewrap"
    tools_at = "where the sandbox sees it, under /usr"

    def trouble(self) -> str:
        """Return why it cannot be used here; empty where it can."""
        missing = [tool for tool in ("bwrap", "prlimit") if shutil.which(tool) is None]
        if missing:
            return f"{' and '.join(missing)} not found"
        try:
            ran = self.run(Program({}, ["sleep", "0.1"], Limits(seconds=20.0)))
        except PermissionError:
            return "the kernel does not show the processes in a sandbox"
        return "" if ran.succeeded else f"bwrap cannot make a sandbox here: {ran.output.strip()[-200:] or ran.end}"

    def run(self, program: Program) -> Outcome:
        with program_folder(program) as here:
            reader, writer = os.pipe()
            seccomp = _seccomp_filter()
            try:
                process = start(_bwrap(here, program, writer, seccomp), pass_fds=(writer, seccomp))
            finally:
                os.close(writer)
                os.close(seccomp)
            with os.fdopen(reader, "rb") as information:
                first = _InitProcess(information.read())
            with first:
                return watch(process, program.limits, first.usage, first.end)


#: Machine → (seccomp's number of it, system calls that allocate memory outside of any process: shmget, memfd_create,
#: memfd_secret, msgget, semget).
CALLS = {"x86_64": (0xC000003E, (29, 319, 447, 68, 64)), "aarch64": (0xC00000B7, (194, 279, 447, 186, 190))}


def _seccomp_filter() -> int:
    """Return a pipe's end with a seccomp filter (linux/filter.h, linux/seccomp.h): those calls fail with EPERM.

    Memory from these calls outlives the process's handle to it, so `_usage` would not count it. Calls of another
    architecture, such as 32-bit ones, fail too, because their numbers differ. An unknown machine has no filter.
    """
    load, equal, least, give = 0x20, 0x15, 0x35, 0x06
    allow, deny = 0x7FFF0000, 0x00050000 | errno.EPERM
    steps = [(give, 0, 0, allow)]
    if (known := CALLS.get(os.uname().machine)) is not None:
        kind, calls = known
        tests = [(least, 0x40000000), *((equal, number) for number in calls)]  # the first: x86's third kind of call
        steps = [(load, 0, 0, 4), (equal, 1, 0, kind), (give, 0, 0, deny), (load, 0, 0, 0)]
        steps += [(code, len(tests) - at, 0, value) for at, (code, value) in enumerate(tests)]
        steps += [(give, 0, 0, allow), (give, 0, 0, deny)]
    read, write = os.pipe()
    with os.fdopen(write, "wb") as filter_:
        filter_.write(b"".join(struct.pack("=HBBI", *step) for step in steps))
    return read


def _bwrap(here: Path, program: Program, info: int, seccomp: int) -> list[str]:
    """Return `bwrap`'s command line.

    The sandbox's root and /dev are remounted read-only at the end: they are in memory and have no size limit.
    """
    python = [str(path) for path in {Path(sys.base_prefix).resolve()} if not path.is_relative_to("/usr")]
    seen = [part for path in (*SYSTEM, *python) if Path(path).exists() for part in ("--ro-bind", path, path)]
    size = str(program.limits.scratch)
    return [
        "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
        "--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv", "--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin",
        "--setenv", "HOME", SCRATCH, "--setenv", "LANG", "C.UTF-8", "--setenv", "PYTHONDONTWRITEBYTECODE", "1",
        *seen, "--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", SCRATCH,
        "--ro-bind", str(here), SOURCES, "--chdir", SOURCES, "--remount-ro", "/dev", "--remount-ro", "/",
        "--seccomp", str(seccomp), "--info-fd", str(info), "--", *prlimit(program.limits), *program.command,
    ]  # fmt: skip


class _InitProcess:
    """A sandbox's first process. When it ends, the kernel ends all others in the sandbox.

    Args:
        information: `bwrap`'s JSON about it; empty where it could not make a sandbox.
    """

    def __init__(self, information: bytes) -> None:
        self._handle: int | None = None
        with contextlib.suppress(ValueError, KeyError, ProcessLookupError):
            self._pid = int(json.loads(information)["child-pid"])
            self._handle = os.pidfd_open(self._pid)

    def __enter__(self) -> _InitProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        """End all processes of the sandbox."""
        if self._handle is not None:
            self.end()
            select.select([self._handle], [], [], 10.0)
            os.close(self._handle)

    def usage(self) -> tuple[int, int]:
        return (0, 0) if self._handle is None else _usage(Path(f"/proc/{self._pid}/root/proc"))

    def end(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)


def _usage(proc: Path) -> tuple[int, int]:
    """Return (threads, bytes of memory) of all processes in the sandbox's own /proc, files in memory (memfd) included.

    Raises:
        PermissionError: the kernel does not show them.
    """
    threads = held = 0
    files: dict[int, int] = {}
    try:
        if proc.stat().st_dev == Path("/proc").stat().st_dev:  # not in its sandbox yet: this is the host's
            return 0, 0
        names = [name for name in os.listdir(proc) if name.isdigit()]  # noqa: PTH208  (names, and many of them)
    except (FileNotFoundError, ProcessLookupError):  # the sandbox has just ended
        return 0, 0
    for name in names:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # starts or ends
            with open(f"{proc}/{name}/status", "rb") as status:  # noqa: PTH123  (50 times a second)
                for line in status:
                    if line.startswith((b"RssAnon:", b"RssShmem:")):
                        held += int(line.split()[1]) << 10
                    elif line.startswith(b"Threads:"):
                        threads += int(line.split()[1])
            for entry in os.scandir(f"{proc}/{name}/fd"):
                if os.readlink(entry.path).startswith("/memfd:"):  # noqa: PTH115
                    found = os.stat(entry.path)  # noqa: PTH116
                    files[found.st_ino] = 512 * found.st_blocks
    return threads, held + sum(files.values())
