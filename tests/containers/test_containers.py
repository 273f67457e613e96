"""The container files fit each other and the package, and build.sh says what is missing; nothing is built here.

`make containers` builds the images and runs them. The engines here are stand-ins that write down how they were called.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from fedloom.cli.app import app
from fedloom.data.loading import load_corpus
from fedloom.experiment.site_data import check
from fedloom.recipe.recipe import DataConfig, Recipe
from fedloom.runtimes.sites.project import Project
from tests.helpers import ROOT

FOLDER = ROOT / "containers"
IMAGES = ["server", "site", "simulator", "evaluation"]
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"containers_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


# ---------------------------------------------------------------------------- the Dockerfile


def stages() -> dict[str, tuple[str, list[str]]]:
    """Stage → (what it is made from, its instructions), lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, tuple[str, list[str]]] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\w+)", line):
            found[match[2]] = (match[1], [])
        elif line and found:
            found[next(reversed(found))][1].append(line)
    return found


def inherited(name: str) -> list[str]:
    """The instructions of a stage and of those that it is made from, oldest first."""
    known = stages()
    parent, own = known[name]
    return [*(inherited(parent) if parent in known else []), *own]


def ignored(path: str) -> bool:
    """What .dockerignore leaves out, the last line that fits deciding; its patterns here are names and `**/name`."""
    left_out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            fits = pattern in {"*", path} or path.startswith(f"{pattern}/")
            fits = fits or (line.startswith("**/") and pattern in path.split("/"))
            left_out = not line.startswith("!") if fits else left_out
    return left_out


def test_every_file_that_the_build_takes_exists_and_reaches_it():
    taken: list[str] = []
    for _, lines in stages().values():
        for line in lines:
            if line.startswith("COPY") and "--from" not in line:
                taken += line.split()[1:-1]
            taken += re.findall(r"--mount=type=bind,source=([^,\s]+)", line)
    assert {"fedloom", "recipes", "pyproject.toml", "constraints.txt", "containers/install.sh"} <= set(taken)
    assert [t for t in taken if not (ROOT / t).exists()] == []
    assert [t for t in taken if ignored(t)] == []


@pytest.mark.parametrize("path", [".git/config", "runs/x/adapter/a", "kits/site/startup/client.key", ".venv/bin/python",
                                  "data/rows.jsonl", "fedloom/__pycache__/x.pyc", "tests/helpers/tiny.py", ".env"])  # fmt: skip
def test_nothing_private_reaches_the_build(path):
    assert ignored(path)


def test_stages_come_from_stages_that_are_there():
    known = stages()
    names = list(known)
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", (FOLDER / "Dockerfile").read_text("utf-8"), re.MULTILINE))
    for name, (parent, lines) in known.items():
        parent = arguments[parent[2:-1]] if parent.startswith("${") else parent
        assert parent in names[: names.index(name)] or parent == "debian:bookworm-slim"
        for source in re.findall(r"from=(\w+)", " ".join(lines)):
            assert source in names[: names.index(name)]
    assert set(IMAGES) <= set(names)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_fedloom_as_an_ordinary_user(image):
    lines = inherited(image)
    words = {kind: [line for line in lines if line.startswith(kind + " ")] for kind in ("USER", "ENTRYPOINT", "CMD")}
    user = words["USER"][-1].split()[1].split(":")[0]
    assert user.isdigit() and int(user) > 0
    assert f"--uid {user} " in " ".join(lines)
    assert json.loads(words["ENTRYPOINT"][-1].removeprefix("ENTRYPOINT "))[-1] == "fedloom"
    asks_for_help = parsed(json.loads(words["CMD"][-1].removeprefix("CMD ")))
    assert asks_for_help is None or asks_for_help["command"] in {"join", "doctor"}
    label = next(line for line in lines if line.startswith("LABEL "))
    for key in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{key}=" in label
    assert f'title="fedloom-{image}"' in label
    volumes = json.loads(next(line for line in lines if line.startswith("VOLUME ")).removeprefix("VOLUME "))
    made = next(line for line in lines if "mkdir" in line)
    assert all(f" {place}" in made.partition("chown")[2] for place in volumes)  # the user may write there
    assert "/cache" in volumes and any("FEDLOOM_HOME=/cache" in line for line in lines)


def test_only_one_stage_asks_an_index():
    asking = {n for n, (_, lines) in stages().items() if "id=pip" in " ".join(lines)}
    assert asking == {"wheels"}
    for name in ("libraries", "federation", "research", "suites", *IMAGES):
        for line in stages()[name][1]:
            assert "pip install" not in line or "--no-index" in line
    assert "--no-index" in (FOLDER / "install.sh").read_text(encoding="utf-8")
    assert "constraints.txt" in (FOLDER / "install.sh").read_text(encoding="utf-8")


def test_every_extra_of_an_image_is_among_the_collected_ones():
    requirements = module("requirements")
    text = {name: " ".join(lines) for name, (_, lines) in stages().items()}
    match = re.search(r"--extras ([\w,]+)", text["wheels"])
    assert match
    collected = set(requirements.requirements(match[1].split(",")))
    for name in ("libraries", "federation", "research", "suites"):
        call = re.search(r" /run/containers/install\.sh((?: \w+)*)$", text[name].partition(" COPY ")[0])
        assert call and bool(call[1]) == (name != "libraries")
        assert set(requirements.requirements(call[1].split())) <= collected


#: Addresses, and folders that are neither the images' own nor a kit's.
ELSEWHERE = re.compile(r"https?://|file:///|/root/|(?<!\*)/home/(?!fedloom\b)|/opt/(?!fedloom\b|collect\b)")


def test_no_address_and_no_place_of_a_machine_stands_in_the_build():
    for path in [*FOLDER.rglob("*"), ROOT / ".dockerignore"]:
        if path.is_file() and "__pycache__" not in path.parts:
            assert not ELSEWHERE.search(path.read_text(encoding="utf-8")), path


# ---------------------------------------------------------------------------- compose.yaml and the demo


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))


def parsed(words: list[str]) -> dict[str, Any] | None:
    """A command line of fedloom as its parameters, None where it only asks for help. Raises click's errors."""
    group = typer.main.get_command(app)
    try:
        with group.make_context("fedloom", list(words)) as context:
            name, command, rest = group.resolve_command(context, list(words))
            with command.make_context(name, rest, parent=context) as inner:
                return {"command": name, **inner.params}
    except typer.Exit:
        return None


def test_services_run_images_that_are_built_and_commands_that_exist(compose):
    for name, service in compose["services"].items():
        image = service["image"].removeprefix("fedloom-")
        assert image in IMAGES
        assert (parsed([str(w) for w in service["command"]]) or {})["command"], name
        build = service.get("build")
        if build:
            assert build["target"] == image
            assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == FOLDER / "Dockerfile"
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        assert set(service.get("networks", [])) <= set(compose["networks"])
        for volume in service["volumes"]:
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert (FOLDER / source).exists() if source.startswith(".") else source in compose["volumes"]
        assert service["cap_drop"] == ["ALL"]


def test_the_demo_is_one_federation(compose):
    """Names in compose.yaml, in the project file and in the kits are the same, and each party sees its own kit only."""
    project = Project.load(FOLDER / "demo" / "project.yaml")
    services = compose["services"]
    assert services["server"]["hostname"] == project.server.host == "server"
    serve = parsed(services["server"]["command"])
    assert serve and str(serve["kit"]) == "/kits/server"
    assert f"EXPOSE {project.server.port}" in inherited("server")
    for entry in project.sites:
        join = parsed(services[entry.name]["command"])
        assert join and str(join["kit"]) == "/kit" and str(join["data"]) == f"/data/{entry.name}.jsonl"
        kits = [v["volume"]["subpath"] for v in services[entry.name]["volumes"] if isinstance(v, dict)]
        assert kits == [entry.name]
        assert f"./demo/data/{entry.name}.jsonl:/data/{entry.name}.jsonl:ro" in services[entry.name]["volumes"]
    sites = {n for n, s in services.items() if s["image"] == "fedloom-site"}
    assert sites == {entry.name for entry in project.sites}
    assert [v["volume"]["subpath"] for v in services["server"]["volumes"] if isinstance(v, dict)] == ["server", "admin"]


def test_the_demos_recipe_and_rows_can_be_used():
    recipe = Recipe.load(FOLDER / "demo" / "recipe.yaml")
    check(recipe, ["a", "b", "c"])
    assert recipe.runtime.name == "distributed"
    for path in sorted((FOLDER / "demo" / "data").iterdir()):
        corpus = load_corpus(DataConfig(path=str(path)), seed=0, splitter="uniform")
        assert len(corpus.examples) >= 39


def test_check_starts_services_after_those_they_wait_for(compose, tmp_path):
    check = module("check")
    order = list(check.order(compose["services"]))
    assert order[:2] == ["provision", "fetch"] and sorted(order) == sorted(compose["services"])
    with pytest.raises(check.Failed, match="wait for each other"):
        list(check.order({"a": {"depends_on": {"b": {}}}, "b": {"depends_on": {"a": {}}}}))
    found = check.mounts(compose["services"]["north"], tmp_path)
    assert found[str(tmp_path / "kits" / "north")] == "/kit"
    assert found[str(FOLDER / "demo" / "data" / "north.jsonl")] == "/data/north.jsonl:ro"


# ---------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_sound_and_stops_at_the_first_error(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    assert re.search(r"^set -eu", script.read_text(encoding="utf-8"), re.MULTILINE)


ENGINE = """#!{python}
import json, os, sys
from pathlib import Path
if os.path.basename(sys.argv[0]) == "docker" and sys.argv[1] == "info":
    sys.exit({down})
secrets = {{w.split("src=")[1]: Path(w.split("src=")[1]).read_text() for w in sys.argv if w.startswith("id=")}}
with open({log!r}, "a") as log:
    log.write(json.dumps([[os.path.basename(sys.argv[0]), *sys.argv[1:]], secrets]) + "\\n")
if sys.argv[1] == "images":
    print(json.dumps([{{"size": "1 GB"}}]) if "--json" in sys.argv else "1 GB")
"""


@pytest.fixture
def bare(tmp_path):
    """A function: build.sh with a PATH of a few tools and stand-ins for the named engines → (exit code, words, calls)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in [
        "bash",
        "cat",
        "cut",
        "dirname",
        "git",
        "grep",
        "head",
        "id",
        "mktemp",
        "rm",
        "sed",
        "sha256sum",
        "tar",
    ]:
        (tools / name).symlink_to(str(shutil.which(name)))
    (tools / "python3").symlink_to(sys.executable)
    log = tmp_path / "calls.jsonl"
    (tmp_path / "tmp").mkdir()

    def build(*words: str, engines: dict[str, bool], **environment: str):
        for name, down in engines.items():
            (tools / name).write_text(ENGINE.format(python=sys.executable, down=int(down), log=str(log)))
            (tools / name).chmod(0o755)
        done = subprocess.run(
            [FOLDER / "build.sh", *words],
            env={"PATH": str(tools), "TMPDIR": str(tmp_path / "tmp"), "PIP_CONFIG_FILE": os.devnull,
                 "HOME": str(tmp_path), **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        assert list((tmp_path / "tmp").iterdir()) == []  # secrets do not stay behind
        return done.returncode, done.stderr + done.stdout, calls

    return build


REFUSALS = {
    "no engine": ([], {}, {}, "there is no buildah: start Docker, or apt-get install buildah"),
    "no daemon": (["--engine", "docker"], {"docker": True}, {}, "no Docker daemon answers"),
    "no buildah": (["--engine", "buildah"], {}, {}, "there is no buildah"),
    "unknown engine": (["--engine", "podman"], {}, {}, "--engine podman: take docker or buildah"),
    "unknown image": (["sever"], {}, {}, "there is no image sever: take one of server site simulator evaluation"),
    "unknown option": (["--push"], {}, {}, "there is no option --push"),
    "no sources": ([], {"buildah": False}, {"APT_SOURCES": "nowhere", "BASE": "b"}, "APT_SOURCES=nowhere"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_build_refuses_in_one_sentence(bare, case):
    words, engines, environment, expected = REFUSALS[case]
    code, said, calls = bare(*words, engines=engines, **environment)
    assert (code, calls) == (2, [])
    assert expected in said and said.startswith("build.sh: ") and said.count("\n") == 1


def test_build_takes_buildah_where_no_daemon_answers_and_shows_folders_to_one_stage_only(bare, tmp_path):
    wheels = tmp_path / "some-wheels"
    wheels.mkdir()
    code, said, calls = bare(
        "site", engines={"docker": True, "buildah": False}, BASE="some-base",
        PIP_INDEX_URL="https://name:secret@packages.example/simple", PIP_FIND_LINKS=str(wheels),
    )  # fmt: skip
    assert code == 0, said
    builds = [(words, secrets) for words, secrets in calls if words[1] == "bud"]
    targets = [words[words.index("--target") + 1] for words, _ in builds]
    assert targets == ["python", "wheels", "site"]
    for words, secrets in builds:
        assert words[0] == "buildah" and words[words.index("--isolation") + 1] == "chroot"
        assert "BASE=some-base" in words
        assert not any("packages.example" in w or "secret@" in w for w in words)  # what `ps` and layers would show
        conf = next(text for name, text in secrets.items() if name.endswith("pip.conf"))
        assert "index-url = https://name:secret@packages.example/simple" in conf
        volumes = [words[i + 1] for i, w in enumerate(words) if w == "--volume"]
        wanted = [f"{wheels}:{wheels}:ro"] if words[words.index("--target") + 1] == "wheels" else []
        assert volumes == wanted
    assert any(w.startswith("WHEELS=localhost/fedloom-wheels:") for w in builds[-1][0])
    assert calls[-1][0][:2] == ["buildah", "tag"]


def test_build_takes_docker_where_a_daemon_answers(bare, tmp_path):
    code, said, calls = bare(engines={"docker": False, "buildah": False})
    assert code == 0, said
    builds = [words for words, _ in calls if words[1] == "build"]
    assert [words[words.index("--target") + 1] for words in builds] == IMAGES
    assert all(words[0] == "docker" and words[-1] == str(ROOT) for words in builds)
    assert not any(w.startswith("BASE=") for words in builds for w in words)
    code, said, _ = bare(engines={"docker": False}, PIP_FIND_LINKS=str(tmp_path))
    assert code == 2 and f"{tmp_path}, which a Docker build cannot see" in said


# ---------------------------------------------------------------------------- the helpers


def test_pips_configuration_is_handed_through_with_its_order_and_its_folders(tmp_path):
    conf = module("pip_conf")
    listing = [
        "global.index-url='https://a.example/simple'",
        ":env:.index-url='https://b.example/simple'",
        "global.extra-index-url='\\nfile:///srv/pypi/simple\\nhttps://c.example/simple'",
        "install.find-links='/srv/wheels'",
        "global.find-links='/srv/other'",
        "global.cert='/etc/ca.crt'",
        "global.progress-bar='off'",
        "download.timeout='30'",
    ]
    settings = conf.in_force(listing)
    assert settings["index-url"] == "https://b.example/simple"
    assert settings["find-links"] == "/srv/wheels"
    assert "progress-bar" not in settings
    assert conf.places(settings) == ["/srv/pypi", "/srv/wheels"]
    path = tmp_path / "pip.conf"
    path.write_text(conf.written(settings))
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": str(path), "HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path)},
    ).stdout  # fmt: skip
    read = conf.in_force(line for line in said.splitlines())
    assert {k: read[k].split() for k in settings} == {
        **{k: v.split() for k, v in settings.items()},
        "cert": [conf.CERTIFICATES],
    }


def test_requirements_are_those_of_pyproject():
    requirements = module("requirements")
    own = requirements.requirements([])
    assert "safetensors>=0.8" in own and not any(r.startswith("nvflare") for r in own)
    assert set(requirements.requirements(["distributed"])) - set(own) == {"nvflare>=2.9,<2.10"}
    assert any(r.startswith("nvflare") for r in requirements.requirements(["dev"]))  # an extra of extras
    assert any(r.startswith("hatchling") for r in requirements.requirements(["build"]))
    with pytest.raises(SystemExit, match="no extra 'distribtued'"):
        requirements.requirements(["distribtued"])


@pytest.mark.parametrize(("words", "expected"), [
    ([], "name the folder to fill"),
    (["--extra", "zstd", "x"], "there is no option --extra"),
    (["a", "b"], "one folder is expected, and a and b were given"),
    (["--only", "wheels", "x"], "--only wheels"),
    (["."], ". is not empty"),
])  # fmt: skip
def test_wheelhouse_refuses_in_one_sentence(words, expected, tmp_path):
    (tmp_path / "something").touch()
    done = subprocess.run(
        [FOLDER / "wheelhouse.sh", *words], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2
    assert expected in done.stderr and done.stderr.startswith("wheelhouse.sh: ") and done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["something"]


def test_health_is_the_servers_port_and_the_sites_process(tmp_path):
    health = module("health")
    assert "holds no kit" in health.trouble(tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        about = {"role": "server", "project": {"server": {"port": listener.getsockname()[1]}}}
        (tmp_path / "kit.yaml").write_text(yaml.safe_dump(about))
        assert "takes no connection" in health.trouble(tmp_path, "127.0.0.1")
        listener.listen()
        assert health.trouble(tmp_path, "127.0.0.1") == ""
    (tmp_path / "kit.yaml").write_text(yaml.safe_dump({"role": "site", "project": "here"}))
    assert "does not run" in health.trouble(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "service.pid").write_text(f"{process.pid}\n")
    assert health.trouble(tmp_path) == ""
    assert process.stdin
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not taken note of yet
    assert "has ended" in health.trouble(tmp_path)
    process.wait()
    assert "does not run" in health.trouble(tmp_path)
