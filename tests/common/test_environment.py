"""What must be set before torch is imported, and what a summary says of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fedloom.common import environment


def fresh(code: str, **variables: str) -> str:
    """The output of Python in a process whose environment has none of our settings but `variables`."""
    clean = {k: v for k, v in os.environ.items() if k not in environment.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**clean, **variables}
    )
    return done.stdout.strip()


def test_settings_are_made_before_torch_and_reach_children():
    code = (
        "import fedloom, sys, os, subprocess; assert 'torch' not in sys.modules;"
        "print(os.environ['MKL_CBWR'], os.environ['OMP_WAIT_POLICY'], fedloom.common.environment.late_settings());"
        "sys.stdout.flush(); subprocess.run('echo $MKL_CBWR', shell=True)"
    )
    products = environment.defaults(environment._read_cpuinfo())["MKL_CBWR"]
    assert fresh(code) == f"{products} PASSIVE []\n{products}"


INTEL, AMD = "vendor_id\t: GenuineIntel\nflags\t\t: ", "vendor_id\t: AuthenticAMD\nflags\t\t: "
WIDE = "avx2 avx512f avx512dq avx512cd avx512bw avx512vl"


@pytest.mark.parametrize(
    ("cpuinfo", "products", "narrowed"),
    [
        (INTEL + "sse2 avx2", "AVX2,STRICT", False),
        (
            INTEL + "avx2 avx512f avx512cd",
            "AVX2,STRICT",
            False,
        ),  # the library's branch wants more than the first of them
        (INTEL + WIDE, "AVX512,STRICT", False),
        (AMD + "sse2 avx2", "AVX2", False),
        (AMD + WIDE, "AVX2", True),
        ("", "AVX2", False),  # no such file: macOS, Windows
    ],
)
def test_what_keeps_bits_over_thread_counts_depends_on_the_processor(cpuinfo, products, narrowed):
    found = environment.defaults(cpuinfo)
    assert found["MKL_CBWR"] == products
    assert (found.get("ATEN_CPU_CAPABILITY"), found.get("ONEDNN_MAX_CPU_ISA")) == (
        ("avx2", "AVX2") if narrowed else (None, None)
    )
    assert set(found) <= set(environment.SETTINGS)


def test_products_have_the_same_bits_for_any_number_of_threads():
    """The shapes are those in which the plain branch gave other bits on one maker's processors, and none on another's."""
    code = """
import fedloom, torch
products = {}
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    source = torch.Generator().manual_seed(1)
    products[threads] = []
    for rows, inner, columns in ((256, 256, 688), (96, 256, 256), (7, 64, 64), (8, 200, 576), (33, 2048, 2048)):
        left, right = torch.randn(rows, inner, generator=source), torch.randn(columns, inner, generator=source)
        stacked = torch.bmm(left.expand(3, rows, inner), right.T.expand(3, inner, columns))
        products[threads] += [left @ right.T, right @ left.T, torch.nn.functional.linear(left, right, torch.ones(columns)), stacked]
print(all(torch.equal(a, b) for threads in (2, 3) for a, b in zip(products[1], products[threads])))
"""
    assert fresh(code) == "True"


def test_what_the_user_has_set_stays():
    code = "import fedloom, os; print(os.environ['MKL_CBWR'], os.environ['OMP_WAIT_POLICY'])"
    assert fresh(code, MKL_CBWR="COMPATIBLE", OMP_WAIT_POLICY="ACTIVE") == "COMPATIBLE ACTIVE"


def test_settings_that_come_too_late_are_said():
    code = (
        "import torch, json; from fedloom import environment;"
        "print(json.dumps([environment.late_settings(), environment.describe()]))"
    )
    late, described = json.loads(fresh(code))
    assert {"MKL_CBWR", "OMP_WAIT_POLICY"} <= set(late)
    assert "MKL_CBWR" in described["set_after_torch"]


def test_cores_follow_affinity_and_quota(monkeypatch, tmp_path):
    cores = environment.available_cores()
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert environment.available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    limits = tmp_path / "cpu.max"
    monkeypatch.setattr(environment, "Path", lambda path: limits if "cpu.max" in str(path) else tmp_path / "none")
    for text, expected in (("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1), ("nonsense", 64)):
        limits.write_text(text)
        assert environment.available_cores() == expected
    limits.unlink()
    assert environment.available_cores() == 64


def test_peak_memory_grows_with_what_is_held():
    code = """
from fedloom.common.environment import peak_memory_bytes
before = peak_memory_bytes()
held = bytearray(before + (64 << 20))  # whatever the peak was: more than that is held now
for at in range(0, len(held), 4096): held[at] = 1
print(before, len(held), peak_memory_bytes())
"""
    before, held, after = map(int, fresh(code).split())
    assert before > 10 << 20
    assert held < after < before + held + (64 << 20)


def test_versions_and_machine():
    versions = environment.versions()
    for name in ("python", "fedloom", "torch", "transformers", "peft", "safetensors"):
        assert versions[name]
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    described = environment.describe()
    assert described["threads"] == torch.get_num_threads()
    assert described["cores"] == environment.available_cores()
    assert described["device"] == "cpu" or torch.cuda.is_available()
    assert json.loads(json.dumps(described)) == described


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_its_utilisation_is_unknown():
    assert environment.gpu_utilisation() is None


def test_nothing_of_the_users_secrets_enters_a_summary(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    assert "hf_secret_value" not in json.dumps([environment.describe(), environment.versions()])
