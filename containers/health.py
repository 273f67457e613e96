"""Whether a party of a federation is well, for a container's health check: `python health.py KIT`; exit code 0 or 1.

A server is well when its port takes connections, a site when its service runs. Whether the two have found each other
is not asked here: a site that waits for its server is well, and `fedloom join KIT --check` says what it waits for.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import yaml


def trouble(kit: Path, host: str = "localhost") -> str:
    """What is wrong, empty where nothing is."""
    try:
        about = yaml.safe_load((kit / "kit.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        return f"{kit} holds no kit ({error.strerror})"
    return _silent(host, int(about["project"]["server"]["port"])) if about["role"] == "server" else _ended(kit)


def _silent(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), 3.0).close()
    except OSError as error:
        return f"port {port} takes no connection ({error.strerror or error})"
    return ""


def _ended(kit: Path) -> str:
    """Whether the process of service.pid is gone, or only waits to be taken note of (a zombie)."""
    try:
        pid = int((kit / "service.pid").read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return "the site's service does not run"
    return "the site's service has ended" if state in "ZX" else ""


if __name__ == "__main__":
    wrong = trouble(Path(sys.argv[1]))
    print(wrong or "well")
    sys.exit(bool(wrong))
