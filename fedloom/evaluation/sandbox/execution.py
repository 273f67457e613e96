"""Run programs that a model wrote in a sandbox, never in this process.

A program may do anything, so its limits are enforced from outside. It sees the system's own programs read-only, an empty
/tmp of a bounded size, no network, no other process and no file of the user. Its time, memory, processes and output are
bounded. When it exceeds one limit, it and everything that it started are ended.

    Bubblewrap   Linux namespaces through `bwrap`, where it is installed (bubblewrap.py)
    Container    Docker or Podman, where bwrap is not installed
    Unsafe       a plain child process with limits only, where the user asks for it

This file does not know languages, tasks or models. The kernel is shared: a program that exploits a hole in it may leave
the sandbox. Where that matters, run the evaluation in a virtual machine.
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
    Outcome,
    Program,
    Sandbox,
    prlimit,
    program_folder,
    start,
    watch,
)


def find_sandbox(*, allow_unsafe: bool = False) -> Sandbox:
    """Return the best sandbox that works here.

    Raises:
        UserError: there is none, and `allow_unsafe` is False.
    """
    tried = []
    for sandbox in (Bubblewrap(), Container()):
        trouble = sandbox.trouble()
        if not trouble:
            return sandbox
        tried.append(trouble)
    if allow_unsafe:
        return Unsafe()
    raise UserError(
        f"programs that a model wrote run only in a sandbox, and none works here ({'; '.join(tried)}): install bubblewrap "
        "(apt install bubblewrap), or run them as yourself with --allow-unsafe"
    )


def run_all(sandbox: Sandbox, programs: Sequence[Program], workers: int) -> list[Outcome]:
    """Run all programs, `workers` at a time; returns their outcomes in order."""
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="sandbox") as pool:
        return list(pool.map(sandbox.run, programs))


class Container:
    """Docker or Podman: one container for each program. The engine limits memory and processes."""

    name = "container"
    image = "fedloom-evaluation"
    tools_at = f"in the image {image}"

    def __init__(self, engines: Sequence[str] = ("docker", "podman")) -> None:
        self._engine = next((e for e in engines if shutil.which(e)), None)

    def trouble(self) -> str:
        """Return why it cannot be used here; empty where it can."""
        if self._engine is None:
            return "neither docker nor podman found"
        inspected = subprocess.run(
            [self._engine, "image", "inspect", self.image], capture_output=True, text=True, check=False, timeout=30
        )
        return "" if inspected.returncode == 0 else f"{self._engine} has no image {self.image}, or does not run"

    def run(self, program: Program) -> Outcome:
        assert self._engine is not None
        engine, name = self._engine, f"fedloom-{uuid.uuid4().hex[:12]}"
        with program_folder(program) as sources:
            process = start(self.argv(sources, name, program))

            def end() -> None:
                subprocess.run([engine, "kill", name], capture_output=True, check=False, timeout=30)

            return watch(process, program.limits, lambda: (0, 0), end)

    def argv(self, sources: Path, name: str, program: Program) -> list[str]:
        """Return the engine's command line."""
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
    """A child process as the user, with the kernel's limits. It may read and change all that the user may."""

    name = "unsafe"
    tools_at = "here"

    def run(self, program: Program) -> Outcome:
        with program_folder(program) as sources, tempfile.TemporaryDirectory(prefix="fedloom-run-") as scratch:
            here = {SOURCES: str(sources), SCRATCH: scratch}
            argv = [*prlimit(program.limits), *(_local_paths(part, here) for part in program.command)]
            environment = {"PATH": os.environ.get("PATH", ""), "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8"}
            process = start(argv, cwd=sources, env=environment)
            return watch(process, program.limits, lambda: (0, 0), lambda: _kill_group(process.pid))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _local_paths(part: str, here: Mapping[str, str]) -> str:
    """Replace the sandbox's paths in a command's argument by local ones, since there is no sandbox."""
    return re.sub(rf"(?<![\w/.])({'|'.join(here)})(?![\w.])", lambda found: here[found[1]], part)
