"""Set the environment before torch is imported, and describe the machine for a run's summary.

`MKL_CBWR` makes matrix products give the same bits with every number of threads. The value that does so at no cost
depends on the processor's maker (docs/adr/0008). `OMP_WAIT_POLICY=PASSIVE` keeps idle threads from spinning, which
costs
a factor of ten on a shared machine. These are only defaults: the user's settings stay. Child processes inherit them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: Environment variables in a run's summary.
SETTINGS = ("MKL_CBWR", "OMP_WAIT_POLICY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "TOKENIZERS_PARALLELISM")


#: Packages whose versions determine the result of a run.
PACKAGES = ("fedloom", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "datasets", "numpy",
            "pydantic", "reasoning-gym")  # fmt: skip


def prepare() -> None:
    """Set the defaults. Has no effect if torch is already imported; `late_settings` then reports that."""
    for name, value in defaults(_read_cpuinfo()).items():
        if "torch" in sys.modules and name not in os.environ:
            _LATE.append(name)
        os.environ.setdefault(name, value)


def defaults(cpuinfo: str) -> dict[str, str]:
    """Return environment variable → value for a machine with this /proc/cpuinfo; empty if it is unknown.

    On Intel's processors the library gives the same bits for all thread counts only in its strict mode. On others
    strict mode
    is not promised. The plain branch gave the same bits in measurements; wider vectors did not, and stay off.
    """
    flags = next((set(line.split()) for line in cpuinfo.splitlines() if line.startswith("flags")), set())
    wide = {"avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
    found = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    if "GenuineIntel" in cpuinfo:
        return found | {"MKL_CBWR": "AVX512,STRICT" if wide else "AVX2,STRICT"}
    if "avx512f" in flags:
        found |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    return found | {"MKL_CBWR": "AVX2"}


_LATE: list[str] = []


def _read_cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def late_settings() -> list[str]:
    """Return settings made after torch was imported, so that results may differ between thread counts."""
    return list(_LATE)


def available_cores() -> int:
    """Return the number of cores that this process may use, by affinity and by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def cpp_compiler() -> str:
    """Return the name or path of the C++ compiler that torch calls on a CPU, whether or not it exists."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def peak_memory_bytes() -> int | None:
    """Return the peak resident memory of this process in bytes; on a GPU, plus the GPU's peak memory."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024
    import torch

    return peak + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def reset_peak_memory() -> None:
    """Reset the peak of `peak_memory_bytes`, after returning unused memory to the system.

    Linux only (proc_pid_clear_refs); elsewhere the peak stays that of the whole process.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def gpu_utilisation() -> float | None:
    """Return the GPU's utilisation in percent; None without a GPU or its management library."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return float(torch.cuda.utilization())
    except (ModuleNotFoundError, RuntimeError):
        return None


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if "fedloom" not in found:
        from fedloom.common.version import __version__

        found["fedloom"] = __version__
    return found


def versions() -> dict[str, str]:
    """Return package → version of the packages that determine a result, and Python's own.

    Reads them once per process.
    """
    return dict(_versions())


def describe() -> dict[str, Any]:
    """Describe the machine and the settings, which have to be equal for a run to repeat exactly."""
    import torch

    return {
        "platform": platform.platform(terse=True),
        "processor": _read_processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: os.environ[name] for name in SETTINGS if name in os.environ},
        **({"set_after_torch": ", ".join(_LATE)} if _LATE else {}),
    }


def _read_processor() -> str:
    for line in _read_cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the git commit of fedloom's checkout, marked if it was changed; None for an installed wheel."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder.parent / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
