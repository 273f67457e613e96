"""A federation on this machine as organisations would have it, and whether it makes the simulator's adapter.

    python benchmarks/demo_distributed.py            `make demo-distributed` does this on a fresh clone
    python benchmarks/demo_distributed.py --keep DIR keeps kits, logs and run folders

The commands are the real ones, each a process of its own: `fedloom provision`, three times `fedloom join`, `fedloom serve`.
Sites dial out over mutual TLS on loopback; each has its own part of the corpus in a file and nothing of the others'. The
recipe runs twice, without message operators and with them, and each time in the simulator as well. Lines:

    NAME.sites=SHA256  NAME.simulator=SHA256  NAME.equal=yes|no  NAME.seconds=      for NAME in plain, operators
    processes_left=0

The exit code is 1 where two adapters differ, a command fails, or a process is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedloom.recipe.recipe import Recipe

import psutil  # isort: skip

from fedloom.common.yaml import dump_yaml
from fedloom.experiment.local_sites import deal, free_port
from fedloom.federation.workplace import find_data

SITES = ("north", "south", "west")

#: Small messages both ways, as the recipe `quantised` has them.
OPERATORS = {
    "initial": [{"name": "quantize", "bits": 8}],
    "up": [{"name": "delta"}, {"name": "quantize", "bits": 4, "error_feedback": True}, {"name": "deflate"}],
    "down": [{"name": "quantize", "bits": 8}],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="three-sites")
    parser.add_argument("--model", help="another model than the recipe's")
    parser.add_argument("--keep", type=Path, help="a new folder for kits, logs and runs, which stays")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else sites of a shell's background job would not hear it
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-demo-")))
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        plain = Recipe.load(given.recipe, {"model": given.model} if given.model else {})
        recipes = {"plain": plain, "operators": plain.with_values({"operators": OPERATORS})}
        try:
            equal = demonstrate(recipes, folder)
        finally:
            left = processes(folder)
            print(f"processes_left={len(left)}")
        return 0 if equal and not left else 1


def demonstrate(recipes: dict[str, Recipe], folder: Path) -> bool:
    """Both recipes between sites, then both in the simulator; whether each pair of adapters is equal."""
    files = {name: folder / f"{name}.yaml" for name in recipes}
    for name, path in files.items():
        path.write_text(recipes[name].to_yaml(), encoding="utf-8")
    clients = dealt(recipes["plain"], folder)
    project = folder / "project.yaml"
    sites = [{"name": site, "client": client} for site, client in zip(SITES, clients, strict=True)]
    project.write_text(dump_yaml({"name": "demo", "server": {"port": free_port()}, "sites": sites}), encoding="utf-8")
    fedloom("provision", project, "--out", folder / "kits")
    seconds = {}
    with joined(folder):
        for name, path in files.items():
            began = time.monotonic()
            fedloom("serve", folder / "kits" / "server", path, "--out", folder / "runs" / name)
            seconds[name] = time.monotonic() - began
    equal = True
    for name, path in files.items():
        fedloom("run", path, "--out", folder / "runs" / f"{name}-simulated", "--quiet")
        found = [digest(folder / "runs" / run) for run in (name, f"{name}-simulated")]
        same = found[0] == found[1]
        equal &= same
        print(
            f"{name}.sites={found[0]}\n{name}.simulator={found[1]}\n{name}.equal={'yes' if same else 'no'}\n"
            f"{name}.seconds={seconds[name]:.1f}",
            flush=True,
        )
    return equal


def dealt(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """The corpus, split as the simulator splits it, a file for each site; returns the clients."""
    found = find_data(recipe)
    clients = found.clients.clients
    files = {client: folder / "data" / f"{site}.jsonl" for site, client in zip(SITES, clients, strict=True)}
    deal(recipe, found, files)
    return clients


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[None]:
    """Three sites, each a `fedloom join` that is interrupted in the end as a person would."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for site in SITES:
            kit, data = folder / "kits" / site, folder / "data" / f"{site}.jsonl"
            with (folder / f"{site}.log").open("wb") as log:
                command = [*COMMAND, "join", str(kit), "--data", str(data), "--threads", "1"]
                started.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        yield
    finally:
        for process in started:
            process.send_signal(signal.SIGINT)
        for process in started:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.terminate()


COMMAND: Sequence[str] = (sys.executable, "-m", "fedloom")


def fedloom(*args: Any) -> None:
    """One command, its progress on this terminal."""
    print("$ fedloom", *args, flush=True)
    subprocess.run([*COMMAND, *(str(a) for a in args)], check=True, stdin=subprocess.DEVNULL)


def digest(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text(encoding="utf-8"))["adapter_sha256"])


def processes(folder: Path) -> list[psutil.Process]:
    """Processes that this demonstration started and that are still there: they name its folder, or work in it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            about = [*process.cmdline(), process.cwd(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(folder) in text for text in about):
                found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main())
