"""File systems of a test's own, to fill and to make read-only: small tmpfs mounts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def mount(place: Path, options: str) -> None:
    place.mkdir(exist_ok=True)
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a tmpfs is not permitted here: {getattr(error, 'stderr', error)}")


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True, capture_output=True)
