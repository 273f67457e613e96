"""Runs programs that a model wrote: in a cage, never in this process.

A program may do anything, so it is held from outside. It sees the system's own programs read-only, an empty /tmp of a
bounded size, no network, no other process and no file of the user; it has bounded time, memory, processes and output,
and when one of these is over, everything that it started ends with it.

    Bubblewrap   Linux namespaces through `bwrap`, where it is installed (bubblewrap.py)
    Container    Docker or Podman, where it is not
    Unsafe       a plain child process with limits and nothing else, only where the user insists

This file does not know languages, tasks or models. What a cage does not hold: the kernel is shared, so a program that
knows an unmended hole in it may leave; who fears that runs the evaluation in a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedloom.common.errors import UserError
from fedloom.evaluation.sandbox.bubblewrap import Bubblewrap
from fedloom.evaluation.sandbox.programs import (
    PYTHON,
    SCRATCH,
    SOURCES,
    Cage,
    Program,
    Ran,
    folder,
    prlimit,
    start,
    watched,
)


def find_cage(*, allow_unsafe: bool = False) -> Cage:
    """The best cage that works here.

    Raises:
        UserError: there is none, and `allow_unsafe` was not asked for.
    """
    tried = []
    for cage in (Bubblewrap(), Container()):
        trouble = cage.trouble()
        if not trouble:
            return cage
        tried.append(trouble)
    if allow_unsafe:
        return Unsafe()
    raise UserError(
        f"programs that a model wrote are run in a cage only, and none works here ({'; '.join(tried)}): install bubblewrap "
        "(apt install bubblewrap), or insist on running them as yourself with --allow-unsafe"
    )


def run_all(cage: Cage, programs: Sequence[Program], workers: int) -> list[Ran]:
    """How each ended, in their order."""
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="cage") as pool:
        return list(pool.map(cage.run, programs))


class Container:
    """Docker or Podman: one container for each program, which limits memory, processes and time by its engine."""

    name = "container"
    image = "fedloom-evaluation"
    tools_at = f"in the image {image}"

    def __init__(self, engines: Sequence[str] = ("docker", "podman")) -> None:
        self._engine = next((e for e in engines if shutil.which(e)), None)

    def trouble(self) -> str:
        """Why it cannot be used here; empty where it can."""
        if self._engine is None:
            return "neither docker nor podman found"
        asked = subprocess.run(
            [self._engine, "image", "inspect", self.image], capture_output=True, text=True, check=False, timeout=30
        )
        return "" if asked.returncode == 0 else f"{self._engine} has no image {self.image}, or does not run"

    def run(self, program: Program) -> Ran:
        assert self._engine is not None
        engine, name = self._engine, f"fedloom-{uuid.uuid4().hex[:12]}"
        with folder(program) as sources:
            process = start(self.argv(sources, name, program))

            def end() -> None:
                subprocess.run([engine, "kill", name], capture_output=True, check=False, timeout=30)

            return watched(process, program.limits, lambda: (0, 0), end)

    def argv(self, sources: Path, name: str, program: Program) -> list[str]:
        """The engine's command line."""
        limits, (first, *others) = program.limits, program.command
        entry = "python3" if first == PYTHON else first  # the image has its own
        return [
            str(self._engine), "run", "--rm", "--name", name, "--network", "none", "--read-only", "--cap-drop", "ALL",
            "--security-opt", "no-new-privileges", "--user", "65534:65534", "--memory", str(limits.memory),
            "--memory-swap", str(limits.memory), "--pids-limit", str(limits.processes),
            "--tmpfs", f"{SCRATCH}:rw,exec,size={limits.scratch}", "--volume", f"{sources}:{SOURCES}:ro",
            "--workdir", SOURCES, "--env", f"HOME={SCRATCH}", "--entrypoint", entry, self.image, *others,
        ]  # fmt: skip


class Unsafe:
    """A child process as the user, with the kernel's limits: it sees and may change whatever the user may."""

    name = "unsafe"
    tools_at = "here"

    def run(self, program: Program) -> Ran:
        with folder(program) as sources, tempfile.TemporaryDirectory(prefix="fedloom-run-") as scratch:
            here = {SOURCES: str(sources), SCRATCH: scratch}
            argv = [*prlimit(program.limits), *(_moved(part, here) for part in program.command)]
            environment = {"PATH": os.environ.get("PATH", ""), "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8"}
            process = start(argv, cwd=sources, env=environment)
            return watched(process, program.limits, lambda: (0, 0), lambda: _kill_group(process.pid))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _moved(part: str, here: Mapping[str, str]) -> str:
    """A command's paths, where there is no cage to give them their names."""
    return re.sub(rf"(?<![\w/.])({'|'.join(here)})(?![\w.])", lambda found: here[found[1]], part)
