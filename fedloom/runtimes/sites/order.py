"""Files between the command `fedloom serve` and the engine's job, and checks of kits."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fedloom.common.errors import UserError
from fedloom.common.files import lock_file, write_json
from fedloom.common.yaml import load_yaml
from fedloom.federation.record.events import Event
from fedloom.runtimes.sites.project import LAUNCHER_CLASS, SERVER_CLASS, SITE_CLASS

#: In a run's folder: the folder of what belongs to the federation and not to the run itself.
FEDERATION = "federation"


@dataclass(frozen=True)
class Order:
    """The command's instructions for the job, as a file, because the engine starts the job's process.

    Attributes:
        folder: the folder of the files that both exchange: `watch.jsonl`, `heard.json` and `outcome.json`.
    """

    recipe: dict[str, Any]
    out: str
    resume: bool
    overwrite: bool
    project: dict[str, Any]
    folder: str

    def write(self, path: Path) -> None:
        write_json(path, self.__dict__)

    @classmethod
    def read(cls, path: Path) -> Order:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


#: Role of a kit → the classes of this package that its engine loads.
CLASSES = {"server": {SERVER_CLASS}, "site": {SITE_CLASS, LAUNCHER_CLASS}}


#: The outcome of a job after which another job continues the run.
AGAIN = -1


class Lines:
    """Writes what a `Watch` receives as lines of a file, which another process reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def _write(self, kind: str, value: Any) -> None:
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: value}) + "\n")

    def say(self, text: str) -> None:
        self._write("say", text)

    def event(self, event: Event) -> None:
        self._write("event", event)

    def tick(self, what: str, round: int, done: int, total: int) -> None:
        self._write("tick", [what, round, done, total])


def kit_file(kit: Path, role: str) -> dict[str, Any]:
    """Read a kit's kit.yaml.

    Raises:
        UserError: the folder is not a kit, is another party's kit, or was provisioned by another release of fedloom.
    """
    try:
        values = load_yaml((kit / "kit.yaml").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{kit} is no kit: give a folder that `fedloom provision` made") from None
    if values["role"] != role:
        raise UserError(f"{kit} is the {values['role']}'s kit, and the {role}'s is needed here")
    _check_classes(kit, role)
    return dict(values)


def _check_classes(kit: Path, role: str) -> None:
    """Reject a kit whose engine would load classes that this release does not have. The engine itself reports no reason."""
    try:
        resources = json.loads((kit / "local" / "resources.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # an admin's kit has no such file
        return
    paths = [component.get("path") for component in resources.get("components", [])]
    named = {
        *resources.get("class_allow_list", []),
        *(p for p in paths if isinstance(p, str) and p.startswith("fedloom.")),
    }
    if role in CLASSES and named != CLASSES[role]:
        wrong = ", ".join(sorted(named ^ CLASSES[role]))
        bring = " and copy this site's kit.yaml and local/resources.json into this folder" if role == "site" else ""
        raise UserError(
            f"{kit} was provisioned by another release of fedloom (local/resources.json differs in {wrong}). "
            f"Run `fedloom provision` again into the folder of the kits{bring}; certificates and settings stay"
        )


def hold(kit: Path, command: str) -> TextIO:
    """Lock the kit for this process until the returned file is closed or the process ends. Raises UserError."""
    lock = lock_file(kit / ".lock")
    if lock is None:
        raise UserError(f"another `fedloom {command}` uses {kit}: end that one first")
    return lock
