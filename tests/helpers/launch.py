"""The real command line in processes of its own, without paying for the imports each time.

`python launch.py` imports fedloom once and then forks a child for each request; the child runs `fedloom ARGS` as the
console script does, with its own folder, environment and output files, and can be killed like any process. `setup` is
Python that the child runs first, to register a test's algorithm or to cause a fault at an exact moment.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fedloom.recipe.recipe import Recipe


#: What every run imports, fedloom first; no code of torch may run before the fork.
PRELOADED = ("fedloom.cli.runs", "fedloom.experiment.run", "fedloom.runtimes.simulator", "fedloom.algorithms.averaging.fedavg",
             "transformers.models.llama.modeling_llama")  # fmt: skip


@dataclass(frozen=True)
class Done:
    """How a process ended. `code` is negative for a signal."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one sentence on stderr that ends a command in trouble; nothing but progress may stand before it."""
        lines = self.err.rstrip("\n").split("\n")
        assert lines[-1].startswith("fedloom: "), self.err
        for line in lines[:-1]:
            assert not re.search(r"fedloom: |Traceback|Error|Warning", line), self.err
        return lines[-1].removeprefix("fedloom: ")


class Running:
    """A process that was started and not yet waited for."""

    def __init__(self, launcher: Launcher, pid: int, files: tuple[Path, Path]) -> None:
        self.pid = pid
        self._launcher = launcher
        self._files = files

    def send(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Done:
        code = int(self._launcher.line())
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._files)
        return Done(code, out, err)


class Launcher:
    """Starts one `fedloom` process after another. `folder` is for their output."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        command = [sys.executable, __file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self._server.stdout is not None
        text = self._server.stdout.readline()
        assert text, "the launcher's process is gone"
        return text

    def start(self, *args: Any, cwd: Path, env: Mapping[str, str] | None, setup: str) -> Running:
        self._count += 1
        files = self._folder / f"{self._count}.out", self._folder / f"{self._count}.err"
        environment = {**os.environ, **(env or {})}
        request = {"args": [str(a) for a in args], "cwd": str(cwd), "env": environment, "setup": setup}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({**request, "files": [str(f) for f in files]}) + "\n")
        self._server.stdin.flush()
        return Running(self, int(self.line()), files)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)


@cache
def launcher(folder: Path) -> Launcher:
    """One for each test process; it ends with it."""
    made = Launcher(folder)
    atexit.register(made.close)
    return made


class Cli:
    """`fedloom` in one folder, as the fixture `cli` gives it."""

    def __init__(self, launcher: Launcher, cwd: Path) -> None:
        self.launcher = launcher
        self.cwd = cwd

    def __call__(self, *args: Any, setup: str = "", env: Mapping[str, str] | None = None) -> Done:
        return self.start(*args, setup=setup, env=env).wait()

    def start(self, *args: Any, setup: str = "", env: Mapping[str, str] | None = None) -> Running:
        return self.launcher.start(*args, cwd=self.cwd, env=env, setup=setup)


@pytest.fixture(scope="session")
def launch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture
def cli(tmp_path: Path, launch_folder: Path, fedloom_home: Path) -> Cli:
    """`cli("run", recipe, "train.lr=0.1")` runs the real command in a process of its own, in the test's folder."""
    return Cli(launcher(launch_folder), tmp_path)


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> Callable[..., Path]:
    """`tiny_recipe` as a file, for the command line."""

    def write(overrides: Mapping[str, Any] | None = None, name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(tiny_recipe(overrides, name=name).to_yaml(), encoding="utf-8")
        return path

    return write


def child(values: dict[str, Any]) -> int:
    """Runs to its end and returns the exit code; taking a whole interpreter down would cost a second more."""
    import fedloom.cli.runs

    os.environ.clear()
    os.environ.update(values["env"])
    os.chdir(values["cwd"])
    sys.argv = ["fedloom", *values["args"]]
    code: Any = 0
    try:
        exec(values["setup"], {})
        fedloom.cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def serve() -> None:
    for name in PRELOADED:
        import_module(name)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    over = 0
    while request := sys.stdin.readline():
        if over:
            os.waitpid(over, 0)
        pid = os.fork()
        if pid == 0:
            answers.close()
            values = json.loads(request)
            for number, path in zip((1, 2), values["files"], strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os._exit(child(values))
        answers.write(f"{pid}\n")
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        answers.write(f"{ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status}\n")
        over = pid  # reaped at the next request, so that its number is not given away while a test may still kill it


if __name__ == "__main__":
    serve()
