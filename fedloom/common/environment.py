"""What torch and the machine must be told before torch is imported, and what of the machine goes into a summary.

`MKL_CBWR` makes matrix products give the same bits whatever the number of threads; which value does, and costs nothing,
depends on who made the processor (docs/adr/0008). `OMP_WAIT_POLICY=PASSIVE` keeps idle threads from spinning, which on a
shared machine costs a factor of ten. All are only defaults: what the user has set stays. Children inherit them.
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

#: What a run's summary says of its environment.
SETTINGS = ("MKL_CBWR", "OMP_WAIT_POLICY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "TOKENIZERS_PARALLELISM")


#: Packages whose versions decide what a run computes.
PACKAGES = ("fedloom", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "datasets", "numpy",
            "pydantic", "reasoning-gym")  # fmt: skip


def prepare() -> None:
    """Set the defaults. Has no effect on a torch that is already imported; `late_settings` then says so."""
    for name, value in defaults(_cpuinfo()).items():
        if "torch" in sys.modules and name not in os.environ:
            _LATE.append(name)
        os.environ.setdefault(name, value)


def defaults(cpuinfo: str) -> dict[str, str]:
    """Environment variable → value for a machine with this /proc/cpuinfo, empty where there is none.

    On Intel's processors the library keeps its bits over thread counts in its strict mode only. Elsewhere strict mode is
    not promised, and the plain branch was measured to do it; wider vectors were not, and stay off.
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


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def late_settings() -> list[str]:
    """Settings that came after torch was imported, so that bit-for-bit repetition across thread counts is not sure."""
    return list(_LATE)


def available_cores() -> int:
    """Cores that this process may use, by affinity and by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def cpp_compiler() -> str:
    """The C++ compiler that torch calls on a CPU, by its name or path, whether or not it is there."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def peak_memory_bytes() -> int | None:
    """The most resident memory that this process had; with a GPU, its memory comes on top."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024
    import torch

    return peak + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def forget_peak_memory() -> None:
    """Count `peak_memory_bytes` from now on, from what the process holds after what it no longer needs is given back.

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
    """Percent, as the driver sees it now; None without a GPU or without its management library."""
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
    """Package → version of those that decide what a run computes, and Python's own; read once in a process."""
    return dict(_versions())


def describe() -> dict[str, Any]:
    """The machine and the settings that a repeated run has to share."""
    import torch

    return {
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: os.environ[name] for name in SETTINGS if name in os.environ},
        **({"set_after_torch": ", ".join(_LATE)} if _LATE else {}),
    }


def _processor() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout that fedloom runs from, with a mark if it was changed; None for an installed wheel."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder.parent / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
