"""`fedloom join`: keep a site's service running. The site's data path and settings are in a file that stays at the site.

The service connects to the server and waits for runs. If it is killed it is started again. If the server does not
answer, or rejects the certificate, one sentence says so. This file does not know what a run is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.common.errors import UserError
from fedloom.common.files import write_bytes
from fedloom.common.yaml import dump_yaml, load_yaml
from fedloom.runtimes.sites.flare.services import REVOKED, Service, site_service, standing
from fedloom.runtimes.sites.order import hold, kit_file
from fedloom.runtimes.sites.policy import Policy
from fedloom.runtimes.sites.project import SiteConfig

#: In a site's kit: its own settings, kept from one `join` to the next.
SITE_FILE = "local/site.yaml"


def settle(kit: Path, settings: Mapping[str, Any]) -> SiteConfig:
    """Write `settings` into the site's file, which keeps its earlier settings; return them all. Raises UserError."""
    about = kit_file(kit, "site")
    path = kit / SITE_FILE
    earlier = (load_yaml(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    values = {
        **earlier,
        "client": about["client"],
        "home": str((kit / "home").resolve()),
        "policy": str((kit / "local" / "policy.yaml").resolve()),
        **{key: value for key, value in settings.items() if value is not None},
    }
    if "data" not in values:
        raise UserError(f"{kit} has no path to the site's data yet: name a file or a folder with --data")
    if not Path(values["data"]).expanduser().exists():
        raise UserError(f"--data {values['data']} does not exist on this machine: name a file or a folder")
    values["data"] = str(Path(values["data"]).expanduser().resolve())
    site = SiteConfig.model_validate(values)
    Policy.load(Path(site.policy))
    write_bytes(path, dump_yaml({k: v for k, v in values.items() if k not in {"home", "policy", "client"}}).encode())
    write_bytes(kit / "home" / "site.yaml", dump_yaml(site.model_dump(mode="json")).encode())
    return site


class Joined:
    """A site's service, which is started again if it is killed. Raises UserError if the kit is in use."""

    def __init__(self, kit: Path) -> None:
        self._kit = kit
        self._about = kit_file(kit, "site")
        self._lock = hold(kit, "join")
        self._said: str | None = None
        self._seen: str | None = None
        self._starts = 0
        self._began = 0.0
        self._service = self._start()

    def _start(self) -> Service:
        self._starts += 1
        self._began = time.monotonic()
        (self._kit / "service.log").unlink(missing_ok=True)
        file = (self._kit / "home" / "site.yaml").resolve()
        return site_service(self._kit, str(self._about["site"]), {"FEDLOOM_SITE": str(file)})

    @property
    def pid(self) -> int:
        return self._service.pid

    def look(self) -> list[str]:
        """Start the service again if it ended. Returns the state of the connection to the server if it changed."""
        news: list[str] = []
        if not self._service.alive:
            wait = min(60.0, 2.0 ** min(self._starts, 6)) if time.monotonic() - self._began < 60.0 else 0.0
            if time.monotonic() < self._began + wait:
                return news
            found = standing(self._service.log, self.pid)
            if found != REVOKED:  # a revoked site's service ends by itself
                news.append("the site's service ended; it is started again")
            elif found != self._said:
                news.append(found)
                self._said = found
            self._service.close()
            self._service = self._start()
        found = standing(self._service.log, self.pid)
        if found and found == self._seen != self._said:  # twice in a row: not in the middle of an attempt
            news.append(found)
            self._said = found
        self._seen = found
        return news

    def close(self) -> None:
        self._service.close()
        self._lock.close()
