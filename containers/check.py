"""Looks whether built images do what they are for: `python containers/check.py [--engine NAME] [--cache FOLDER] [PART …]`.

`fedloom doctor` in each image, a short run in the simulator's, evaluations of it in the evaluation's, public benchmarks
among them (HumanEval, whose programs are run, where FEDLOOM_DATA is set: no package brings its problems), and the
federation of compose.yaml. Under buildah, where no engine runs that could read it, its services are started from here as
the file says: image, command, volumes, order. Networks, limits and health checks are an engine's and are not tried then:
with chroot isolation the containers share the machine's network, and names of services lead to loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
IMAGES = ("server", "site", "simulator", "evaluation")
#: The user of the images.
USER = 10001
#: What a run of the quickstart recipe is shortened to.
SHORT = ("federation.rounds=1", "train.steps=1", "split.test=0.01", "evaluation.suite=null", "runtime.threads=2")


class Failed(Exception):
    """A check that did not come out; the text says which."""


class Docker:
    """Containers under a daemon. `volumes` is host folder → place in the container."""

    def call(self, image: str, command: list[str], volumes: dict[str, str], names: Sequence[str]) -> list[str]:
        options = [word for host, place in volumes.items() for word in ("--volume", f"{host}:{place}")]
        return ["docker", "run", "--rm", *options, f"fedloom-{image}", *command]

    def close(self) -> None:
        """`--rm` leaves nothing."""


class Buildah:
    """Containers by chroot isolation: what `docker run` reads from an image (entry point, user) is read here."""

    def __init__(self) -> None:
        self._made: list[str] = []

    def call(self, image: str, command: list[str], volumes: dict[str, str], names: Sequence[str]) -> list[str]:
        hosts = [word for name in names for word in ("--add-host", f"{name}:127.0.0.1")]
        container = _said(["buildah", "from", "--pull-never", *hosts, f"localhost/fedloom-{image}"])
        self._made.append(container)
        image_config = json.loads(_said(["buildah", "inspect", container]))["Docker"]["config"]
        # buildah mounts an image's own volumes over ours or below them, as it happens: take them out of the container
        for place in image_config["Volumes"]:
            _said(["buildah", "config", "--volume", f"{place}-", container])
        options = [word for host, place in volumes.items() for word in ("--volume", f"{host}:{place}")]
        options += ["--env", "TINI_SUBREAPER=1"]  # it is not the first process where the machine's are seen
        return [
            "buildah",
            "run",
            "--isolation",
            "chroot",
            *options,
            container,
            "--",
            *image_config["Entrypoint"],
            *command,
        ]

    def close(self) -> None:
        for container in self._made:
            subprocess.run(["buildah", "rm", container], check=False, stdout=subprocess.DEVNULL)


Engine = Docker | Buildah


def _said(command: list[str]) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def run(
    engine: Engine, what: str, image: str, command: list[str], volumes: dict[str, str], names: Sequence[str] = ()
) -> str:
    """A command in a fresh container, to its end; returns what it wrote to standard output. Raises Failed."""
    began = time.monotonic()
    done = subprocess.run(engine.call(image, command, volumes, names), text=True, capture_output=True, check=False)
    mark, seconds = "ok " if done.returncode == 0 else "bad", time.monotonic() - began
    print(f"{mark} {what}: fedloom {' '.join(command)}  ({seconds:.0f} s)", flush=True)
    if done.returncode:
        raise Failed(f"{what} ended with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def folder(path: Path) -> str:
    """A fresh folder that the images' user can write into."""
    path.mkdir(parents=True)
    if os.getuid() == 0:
        os.chown(path, USER, USER)
    else:
        path.chmod(0o777)
    return str(path)


def own(path: Path) -> None:
    """Give a copy to the images' user, where this is root."""
    for each in [path, *path.rglob("*")]:
        if os.getuid() == 0:
            os.chown(each, USER, USER, follow_symlinks=False)


# ---------------------------------------------------------------------------- each image by itself


def images(engine: Engine, work: Path, cache: str) -> None:
    for image in IMAGES:
        print(run(engine, image, image, ["doctor"], {cache: "/cache"}))
    if not (Path(cache) / "models").is_dir():
        run(engine, "model", "simulator", ["fetch", "smollm2-135m"], {cache: "/cache", **handed(work / "handed")})
    place = folder(work / "simulator")
    mounts = {cache: "/cache", place: "/workspace"}
    run(engine, "simulator", "simulator", ["run", "quickstart", *SHORT, "--out", "/workspace/short", "--quiet"], mounts)
    summary = json.loads((work / "simulator" / "short" / "summary.json").read_text(encoding="utf-8"))
    loss = summary["loss"]
    print(f"    loss {loss['before']:.4f} → {loss['after']:.4f}")
    if not loss["after"] < loss["before"]:
        raise Failed("the short run did not lower the held-out loss")
    asked = ["--suite", "skills", "--set", "evaluation.limit=2", "--out", "/workspace/scores.json"]
    print(run(engine, "evaluation", "evaluation", ["evaluate", "/workspace/short", *asked], mounts))
    public = [("helm-mini", {**handed(work / "carriers")})]
    if data := os.environ.get("FEDLOOM_DATA"):
        public.append(("humaneval", {f"{Path(data).resolve()}": "/data:ro"}))
    for suite, more in public:
        out = f"/workspace/{suite}.json"
        asked = ["--suite", suite, "--limit", "2", "--out", out, *(["--allow-unsafe"] if suite == "humaneval" else [])]
        print(run(engine, suite, "evaluation", ["evaluate", "/workspace/short", *asked], {**mounts, **more}))
        score = json.loads((work / "simulator" / f"{suite}.json").read_text(encoding="utf-8"))["score"]
        if not isinstance(score, float) or not 0 <= score <= 1:
            raise Failed(f"{suite} gave no score: {score}")


def handed(place: Path) -> dict[str, str]:
    """What `fedloom fetch` in a container needs of this machine's pip: its configuration and the folders named in it."""
    place.mkdir()
    named = _said([sys.executable, str(HERE / "pip_conf.py"), str(place)]).split()
    own(place)
    found = {str(place / "pip.conf"): "/etc/pip.conf:ro", **{name: f"{name}:ro" for name in named}}
    return found | ({str(place / "ca.crt"): "/run/handed/ca.crt:ro"} if (place / "ca.crt").is_file() else {})


# ---------------------------------------------------------------------------- the federation of compose.yaml


def composed() -> None:
    """Under Docker its own compose reads the file."""
    compose = ["docker", "compose", "-f", str(HERE / "compose.yaml")]
    try:
        if subprocess.run([*compose, "up", "--exit-code-from", "server"], check=False).returncode:
            raise Failed("the federation of compose.yaml did not finish")
    finally:
        subprocess.run([*compose, "down", "--volumes"], check=False)


def order(services: dict[str, Any]) -> Iterator[str]:
    """Services after those that they wait for."""
    placed: list[str] = []
    while len(placed) < len(services):
        ready = [n for n, s in services.items() if n not in placed and set(s.get("depends_on", {})) <= set(placed)]
        if not ready:
            raise Failed("compose.yaml: services wait for each other")
        placed += ready
        yield from ready


def mounts(service: dict[str, Any], volumes: Path) -> dict[str, str]:
    """Host folder → place of a service's volumes; a named volume is a folder below `volumes`."""
    found: dict[str, str] = {}
    for volume in service.get("volumes", []):
        if isinstance(volume, dict):
            found[str(volumes / volume["source"] / volume["volume"]["subpath"])] = volume["target"]
        else:
            source, _, place = volume.partition(":")
            host = HERE / source if source.startswith(".") else volumes / source
            found[str(host.resolve())] = place
    return found


def federation(engine: Engine, work: Path, cache: str, file: Path = HERE / "compose.yaml") -> None:
    """The services of compose.yaml in their order; ends when the server does, and stops the sites as an engine would."""
    composed = yaml.safe_load(file.read_text(encoding="utf-8"))
    services, volumes = composed["services"], work / "volumes"
    volumes.mkdir()
    for name in composed["volumes"]:
        (volumes / name).symlink_to(cache) if name == "cache" else folder(volumes / name)
    waited = [pair for service in services.values() for pair in service.get("depends_on", {}).items()]
    once = {name for name, how in waited if how["condition"] == "service_completed_successfully"}
    going: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in order(services):
            service = services[name]
            image, command = service["image"].removeprefix("fedloom-"), [str(w) for w in service["command"]]
            if name in once:
                run(engine, name, image, command, mounts(service, volumes), list(services))
                continue
            with (work / f"{name}.log").open("w") as log:
                call = engine.call(image, command, mounts(service, volumes), list(services))
                going[name] = subprocess.Popen(call, stdout=log, stderr=log, text=True, start_new_session=True)
        _well(going, work)
        print((work / "server.log").read_text(encoding="utf-8"))
    finally:
        codes = {name: _stop(process) for name, process in going.items()}
    if any(codes[name] != 130 for name in codes if name != "server"):
        raise Failed(f"a site did not end as an interrupted command does: {codes}")
    for path in sorted((volumes / "kits").glob("*/home/audit.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        print(f"    {path.parts[-3]}: {len(lines)} messages left, {sum(line['bytes'] for line in lines):,} bytes")


def _well(going: dict[str, subprocess.Popen[str]], work: Path, patience: float = 900.0) -> None:
    """Wait for the server's end. Raises Failed where it fails, or a site ends before it."""
    until = time.monotonic() + patience
    while going["server"].poll() is None and time.monotonic() < until:
        for name, process in going.items():
            if name != "server" and process.poll() is not None:
                raise Failed(f"{name} ended early: {(work / f'{name}.log').read_text()[-2000:]}")
        time.sleep(1.0)
    if going["server"].poll() != 0:
        logs = [work / "server.log", *sorted((work / "volumes" / "kits").glob("*/home/trainer.log"))]
        said = "\n".join(f"{path}:\n{path.read_text(encoding='utf-8')[-2000:]}" for path in logs)
        raise Failed(f"the server: {going['server'].poll()}\n{said}")


def _stop(process: subprocess.Popen[str]) -> int:
    """The images' stop signal to the first process of a container, and a while to end."""
    first = _first(process.pid)
    if first is not None and process.poll() is None:
        os.kill(first, signal.SIGINT)
    try:
        return process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _first(pid: int) -> int | None:
    """The tini below a process of ours."""
    for child in _children(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() == "tini":
                return child
        if (found := _first(child)) is not None:
            return found
    return None


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=["docker", "buildah"], default="docker" if _daemon() else "buildah")
    parser.add_argument("--cache", type=Path, help="a FEDLOOM_HOME to copy, so that no model is fetched")
    parser.add_argument("parts", nargs="*", metavar="PART", help="images, federation; both by default")
    chosen = parser.parse_args()
    parts = chosen.parts or ["images", "federation"]
    if unknown := set(parts) - {"images", "federation"}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: take images or federation")
    engine: Engine = Docker() if chosen.engine == "docker" else Buildah()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job would hand on that it is ignored
    work = Path(tempfile.mkdtemp(prefix="fedloom-images-"))
    work.chmod(0o755)
    try:
        if chosen.cache:
            shutil.copytree(chosen.cache, work / "cache")
            own(work / "cache")
        cache = str(work / "cache") if chosen.cache else folder(work / "cache")
        if "images" in parts:
            images(engine, work, cache)
        if "federation" in parts:
            composed() if isinstance(engine, Docker) else federation(engine, work, cache)
    except Failed as error:
        sys.exit(f"check.py: {error}")
    finally:
        engine.close()
        shutil.rmtree(work, ignore_errors=True)


def _daemon() -> bool:
    asked = ["docker", "info"]
    return bool(shutil.which("docker")) and subprocess.run(asked, check=False, capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
