"""A cage of Linux namespaces around a program, made by `bwrap`, and the look into it from outside.

The program sees the system's own programs read-only, a /tmp of a bounded size, no network, no other process and no file
of the user. Its processes and their memory are counted through the cage's own /proc; the end of the cage's first process
is the end of all in it. This file does not know what the program is.
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

from fedloom.evaluation.sandbox.programs import SCRATCH, SOURCES, Limits, Program, Ran, folder, prlimit, start, watched

#: What of the machine a caged program sees, read-only, where it is there.
SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/java-11-openjdk", "/etc/java-17-openjdk", "/etc/java-21-openjdk", "/etc/java-25-openjdk",
)  # fmt: skip


class Bubblewrap:
    """Linux namespaces: `bwrap`, and util-linux's `prlimit` for what the kernel itself can bound."""

    name = "bubblewrap"
    tools_at = "where the cage sees it, under /usr"

    def trouble(self) -> str:
        """Why it cannot be used here; empty where it can."""
        missing = [tool for tool in ("bwrap", "prlimit") if shutil.which(tool) is None]
        if missing:
            return f"{' and '.join(missing)} not found"
        try:
            ran = self.run(Program({}, ["sleep", "0.1"], Limits(seconds=20.0)))
        except PermissionError:
            return "the kernel does not show what a cage holds"
        return "" if ran.well else f"bwrap cannot make a cage here: {ran.output.strip()[-200:] or ran.end}"

    def run(self, program: Program) -> Ran:
        with folder(program) as here:
            told, tell = os.pipe()
            refused = _refused()
            try:
                process = start(_bwrap(here, program, tell, refused), pass_fds=(tell, refused))
            finally:
                os.close(tell)
                os.close(refused)
            with os.fdopen(told, "rb") as information:
                first = _First(information.read())
            with first:
                return watched(process, program.limits, first.usage, first.end)


#: Machine → (its number as seccomp says it, system calls that make memory which no process holds: shmget, memfd_create,
#: memfd_secret, msgget, semget).
CALLS = {"x86_64": (0xC000003E, (29, 319, 447, 68, 64)), "aarch64": (0xC00000B7, (194, 279, 447, 186, 190))}


def _refused() -> int:
    """A pipe's end with a seccomp filter (linux/filter.h, linux/seccomp.h) under which those calls fail with EPERM.

    What they make can be let go of and is still there, so nobody would count it. Calls of another kind of machine, such as
    32-bit ones, fail too, since their numbers mean other things. A machine that is not known has no filter.
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


def _bwrap(here: Path, program: Program, tell: int, refused: int) -> list[str]:
    """The cage. The last mounts are made read-only, the cage's own root and /dev, which lie in memory and have no bound."""
    python = [str(path) for path in {Path(sys.base_prefix).resolve()} if not path.is_relative_to("/usr")]
    seen = [part for path in (*SYSTEM, *python) if Path(path).exists() for part in ("--ro-bind", path, path)]
    size = str(program.limits.scratch)
    return [
        "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
        "--cap-drop", "ALL", "--hostname", "cage", "--clearenv", "--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin",
        "--setenv", "HOME", SCRATCH, "--setenv", "LANG", "C.UTF-8", "--setenv", "PYTHONDONTWRITEBYTECODE", "1",
        *seen, "--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", SCRATCH,
        "--ro-bind", str(here), SOURCES, "--chdir", SOURCES, "--remount-ro", "/dev", "--remount-ro", "/",
        "--seccomp", str(refused), "--info-fd", str(tell), "--", *prlimit(program.limits), *program.command,
    ]  # fmt: skip


class _First:
    """A cage's first process, whose end is the end of all in it.

    Args:
        information: what `bwrap` said of it; nothing where it could not make a cage.
    """

    def __init__(self, information: bytes) -> None:
        self._handle: int | None = None
        with contextlib.suppress(ValueError, KeyError, ProcessLookupError):
            self._pid = int(json.loads(information)["child-pid"])
            self._handle = os.pidfd_open(self._pid)

    def __enter__(self) -> _First:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing that was started is left."""
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
    """(threads, bytes held) of all processes that the cage's own /proc shows, files in memory (memfd) counted.

    Raises:
        PermissionError: the kernel does not show them.
    """
    threads = held = 0
    files: dict[int, int] = {}
    try:
        if proc.stat().st_dev == Path("/proc").stat().st_dev:  # not in its cage yet: this is everybody's
            return 0, 0
        names = [name for name in os.listdir(proc) if name.isdigit()]  # noqa: PTH208  (names, and many of them)
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0, 0
    for name in names:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # so has this one, or begins
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
