"""`fedloom serve`: start the engine's server and the run's job, show its log, and start it again if it was lost.

A finished round is on disk, so a job or a service that died is started again with `resume`. After three jobs in a row
without a further finished round, the run has failed. This file does not know what happens in a round.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloom.common.errors import RunFailed, UserError
from fedloom.common.files import write_json
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.run_folder import RunFolder
from fedloom.federation.watch import Watch
from fedloom.recipe.recipe import FederationConfig
from fedloom.runtimes.sites.flare.services import OVER, Admin, Service, server_service, write_job
from fedloom.runtimes.sites.order import AGAIN, Order, kit_file
from fedloom.runtimes.sites.project import Project

log = logging.getLogger(__name__)

#: Seconds that a resumed run waits for all its sites before it continues without some.
AGAIN_SECONDS = 60.0


#: The most jobs in a row that may end without a further finished round.
ATTEMPTS = 3


@dataclass
class Server:
    """A server's kit and the admin's kit."""

    kit: Path
    admin: Path
    project: Project
    user: str

    @classmethod
    def open(cls, kit: Path, admin: Path | None) -> Server:
        """Open both kits. Raises UserError if a folder is not such a kit."""
        about = kit_file(kit, "server")
        admin = admin or kit.parent / "admin"
        user = kit_file(admin, "admin")["admin"]
        return cls(kit, admin, Project.model_validate(about["project"]), str(user))


class _Supervisor:
    def __init__(
        self,
        server: Server,
        order: Order,
        exchange: Path,
        watch: Watch,
        during: Callable[[], None],
        federation: FederationConfig,
    ) -> None:
        self._server = server
        self._order = order
        self._exchange = exchange
        self._watch = watch
        self._during = during
        self._fewest = federation.min_clients
        self._deadline = federation.round_deadline or 0.0
        self._service: Service | None = None
        self._admin: Admin | None = None
        self._read = 0
        self._connected: set[str] = set()
        self._looked = 0.0

    def run(self, wait: float | None) -> None:
        """Run one job after another until one has a final outcome."""
        idle, before = 0, self._finished()
        while True:
            self._begin()
            if idle == 0 and not self._order.resume:
                self._await_sites(wait, 0.0 if wait is None else wait)
            else:
                self._await_sites(min(wait or AGAIN_SECONDS, AGAIN_SECONDS), max(AGAIN_SECONDS, self._deadline))
            outcome = self._job()
            if outcome is not None and outcome["code"] != AGAIN:
                if outcome["code"] == 0:
                    return
                raise (UserError if outcome["code"] == 2 else RunFailed)(outcome["sentence"])
            idle = 0 if self._finished() > before else idle + 1
            before = self._finished()
            if idle >= ATTEMPTS:
                raise RunFailed(
                    f"the server's job ended {idle} times without finishing a round: {before} finished rounds are kept, "
                    f"see {self._server.kit / 'service.log'}"
                )
            why = outcome["sentence"] if outcome else "the server's job was lost"
            log.warning(f"{why}: continuing after round {before}")
            run = RunFolder(Path(self._order.out))
            if run.holds_a_run:
                self._order = replace(self._order, recipe=run.stored_recipe().resolved(), resume=True, overwrite=False)

    def _finished(self) -> int:
        return next(iter(Checkpoints(Path(self._order.out) / "checkpoints").rounds()), 0)

    def _begin(self) -> None:
        """Start the service and a session with it, unless it runs already."""
        if self._service is None or not self._service.alive:
            if self._service is not None:
                self._service.close()
            self._clear()
            path = self._exchange / "order.json"
            order = {"FEDLOOM_ORDER": str(path.resolve())}
            self._service = server_service(self._server.kit, order, self._server.project.revoked)
            self._admin = Admin(self._server.admin, self._server.user)
            self._connected = set()

    def _clear(self) -> None:
        """Delete what a service stores of its jobs, so that the next job starts without it."""
        for left in ("jobs", "snapshots"):
            shutil.rmtree(self._server.kit / left, ignore_errors=True)

    def _await_sites(self, wait: float | None, below: float) -> None:
        """Wait for every site. After `wait` seconds, as many as a round needs are enough; after `below` seconds, give up.

        Raises RunFailed if too few sites connected.
        """
        project, began, said = self._server.project, time.monotonic(), False
        wanted = set(project.clients.values())
        while not wanted <= self._look(0.5):
            if not said:
                log.info(f"waiting for {', '.join(sorted(wanted - self._connected))}")
                said = True
            here, waited = wanted & self._connected, time.monotonic() - began
            if wait is not None and waited > wait and len(here) >= self._fewest:
                log.warning(f"beginning without {', '.join(sorted(wanted - here))}")
                return
            if wait is not None and waited > below:
                raise RunFailed(
                    f"{len(here)} of {len(wanted)} sites came within {below:g} seconds and a round needs {self._fewest} "
                    "(federation.min_clients): finished rounds are kept"
                )
            self._pause()

    def _look(self, every: float) -> set[str]:
        """Return the connected sites, and write them for the job, which knows the sites that it lost."""
        if self._admin is None or time.monotonic() < self._looked + every:
            return self._connected
        self._looked = time.monotonic()
        with contextlib.suppress(Exception):  # the service is ending: its process shows that
            heard = self._admin.connected()
            write_json(self._exchange / "heard.json", heard)
            now = set(heard) & set(self._server.project.clients.values())
            for site in sorted(now - self._connected):
                log.info(f"{site} is connected")
            self._connected = now
        return self._connected

    def _job(self) -> dict[str, Any] | None:
        """Run one job and return its outcome; None if it was lost without one."""
        assert self._service is not None
        assert self._admin is not None
        path = self._exchange / "outcome.json"
        path.unlink(missing_ok=True)
        self._order.write(self._exchange / "order.json")
        job = self._admin.submit(
            write_job(self._exchange / "job", self._server.project.name, max(1, len(self._connected)))
        )
        asked = time.monotonic()
        while True:
            self._pause()
            self._look(3.0)
            if path.is_file():
                self._show()
                self._settled(job)
                return dict(json.loads(path.read_text(encoding="utf-8")))
            if not self._service.alive:
                return None
            if time.monotonic() > asked + 5.0:
                asked = time.monotonic()
                with contextlib.suppress(Exception):
                    if self._admin.status(job).startswith(OVER) and not path.is_file():
                        return None

    def _settled(self, job: str) -> None:
        """Wait until the engine also sees the end of the job, so that the sites are free for another."""
        assert self._admin is not None
        until = time.monotonic() + 15.0
        while time.monotonic() < until and self._service is not None and self._service.alive:
            with contextlib.suppress(Exception):
                if self._admin.status(job).startswith(OVER):
                    return
            self._pause()

    def _pause(self) -> None:
        self._during()
        self._show()
        time.sleep(0.25)

    def _show(self) -> None:
        """Show the job's new log lines, events and progress."""
        path = self._exchange / "watch.jsonl"
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            for kind, value in json.loads(line).items():
                if kind == "say":
                    log.info(value)
                elif kind == "tick":
                    self._watch.tick(*value)
                elif self._watch.event is not None:
                    self._watch.event(value)

    def close(self) -> None:
        if self._admin is not None:
            self._admin.close()
        if self._service is not None:
            self._service.close()
            self._clear()
