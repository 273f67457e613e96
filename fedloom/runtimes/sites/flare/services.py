"""The engine's long-lived processes (one at the server, one at each site), and the administrator's session.

Each service is a child of the command that the user started, writes its log into its kit, and ends with it. This file
does not know what a job does.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nvflare.apis.fl_exception import FLCommunicationError
from nvflare.fuel.flare_api.api_spec import InternalError, JobNotFound, NoConnection
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from fedloom.common.errors import RunFailed
from fedloom.common.files import write_json
from fedloom.runtimes.sites.flare.launcher import clear_jobs
from fedloom.runtimes.sites.project import SERVER_CLASS, SITE_CLASS

#: Messages are large and come in any order. Blocks over 4 MB are mapped one by one, so freed memory returns to the system
#: and leaves no holes in the heap. (If the threshold is not set, glibc raises it to 32 MB.) They use huge pages, because
#: every block is new and 10 MB need 2,400 small pages. The engine's frames of 1 MB come from the heap, which keeps up to
#: 8 MB at its end: mapping those too would take a third of a round's CPU time.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


#: States in which the engine's job is over.
OVER = "FINISHED"


def _end_with_parent() -> None:
    """Let the kernel end this child when the thread that started it, the command's main thread, is gone."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


class Service:
    """One of the engine's processes, started from a kit."""

    def __init__(self, kit: Path, options: list[str], environment: Mapping[str, str]) -> None:
        self.log = kit / "service.log"
        self._kit = kit
        clear_jobs(kit)
        (kit / "transfer").mkdir(exist_ok=True)
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-u", *options],
                cwd=kit,
                env={**os.environ, **ALLOCATOR, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509  (one system call)
            )
        (kit / "service.pid").write_text(f"{self.pid}\n", encoding="utf-8")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it and every process of its session; delete its jobs' folders from the kit."""
        for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=patience)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        clear_jobs(self._kit)
        (self._kit / "service.pid").unlink(missing_ok=True)


#: In a server's kit: the clients that the engine rejects. It reads this file at its start, and has no other list.
REFUSED = "disabled_clients.json"


def server_service(kit: Path, environment: Mapping[str, str], revoked: Sequence[str] = ()) -> Service:
    """Start the server's service. `revoked`: sites to reject; all others are accepted, also if they were revoked before."""
    write_json(kit / REFUSED, {"disabled_clients": sorted(revoked)})
    options = ["-m", "nvflare.private.fed.app.server.server_train", "-m", str(kit.resolve()), "-s", "fed_server.json"]
    return Service(kit, [*options, "--set", "secure_train=true", "org=fedloom", "config_folder=config"], environment)


def site_service(kit: Path, site: str, environment: Mapping[str, str]) -> Service:
    options = ["-m", "nvflare.private.fed.app.client.client_train", "-m", str(kit.resolve()), "-s", "fed_client.json"]
    return Service(
        kit, [*options, "--set", "secure_train=true", f"uid={site}", "org=fedloom", "config_folder=config"], environment
    )


class Admin:
    """The administrator's session: who is connected, and which job runs."""

    def __init__(self, kit: Path, user: str, patience: float = 60.0) -> None:
        until = time.monotonic() + patience
        while True:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    self._session: Session = new_secure_session(user, str(kit.resolve()), timeout=5.0)
                return
            except (NoConnection, InternalError, FLCommunicationError, ConnectionError, TimeoutError) as error:
                if time.monotonic() > until:
                    raise RunFailed(f"the server did not come up within {patience:g} seconds") from error
                time.sleep(0.5)

    def connected(self) -> dict[str, float]:
        """Return site → time of its last message, for the sites that are connected now."""
        info = self._session.get_system_info()
        return {client.name: float(client.last_connect_time or 0.0) for client in info.client_info}

    def submit(self, folder: Path) -> str:
        return str(self._session.submit_job(str(folder.resolve())))

    def status(self, job: str) -> str:
        with contextlib.suppress(JobNotFound):
            return str(self._session.get_job_status(job))
        return f"{OVER}:GONE"

    def abort(self, job: str) -> None:
        with contextlib.suppress(Exception):
            self._session.abort_job(job)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._session.close()


def write_job(folder: Path, name: str, min_sites: int) -> Path:
    """Write a job without code: it has two class names, which are in the allow lists of server and sites."""
    meta = {
        "name": name,
        "resource_spec": {},
        "deploy_map": {"app": ["@ALL"]},
        "min_clients": min_sites,
        "mandatory_clients": [],
    }
    server = {"format_version": 2, "components": [], "workflows": [{"id": "run", "path": SERVER_CLASS, "args": {}}]}
    site = {
        "format_version": 2,
        "components": [],
        "executors": [{"tasks": ["fedloom"], "executor": {"path": SITE_CLASS, "args": {}}}],
    }
    config = folder / "app" / "config"
    config.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    (config / "config_fed_server.json").write_text(json.dumps(server), encoding="utf-8")
    (config / "config_fed_client.json").write_text(json.dumps(site), encoding="utf-8")
    return folder


def last_words(path: Path, count: int = 1 << 16) -> str:
    """Read the last `count` bytes of a log."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read().decode("utf-8", errors="replace")
    return ""


CONNECTED = "connected to the server"


SILENT = (
    "the server does not answer: it does while `fedloom serve` runs there, and is tried again until then "
    "(`fedloom join KIT --check` says more)"
)


FOREIGN = "the server does not take this kit's certificate, or is not the server of this kit: ask for a new kit"


REVOKED = "the server does not let this site in: ask there whether it was revoked; it is tried again every minute"


def standing(log: Path, pid: int) -> str | None:
    """Describe a site's connection to the server in its service's log, as one sentence; None if the log has none yet.

    Args:
        pid: the service's process id; a job's processes write into the same log.
    """
    text = last_words(log)

    def last(*marks: str) -> int:
        return max(text.rfind(mark) for mark in marks)

    let_in = last("Successfully registered client:", "Launched job ")
    if last("CERTIFICATE_VERIFY_FAILED") > let_in:
        return FOREIGN
    silent = last("target_unreachable", f"Not Connected] is closed PID: {pid}")
    if last("is disabled\n") > let_in or last("error:client_quit") > max(
        let_in, silent
    ):  # while it registers; or later
        return REVOKED
    if let_in > silent:
        return CONNECTED
    line = text.rfind(f"is created: PID: {pid}")  # a connection to the server that has not ended
    again = line > silent and "N/A =>" in text[text.rfind("\n", 0, line) : line]
    return CONNECTED if let_in >= 0 and again else SILENT if silent >= 0 else None
