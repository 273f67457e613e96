"""docs/extending.md as it stands: its code in a fresh namespace, and as a package that pip builds and installs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedloom
from tests.helpers import ROOT
from fedloom.common import registry
from fedloom.federation.record.checkpoints import ClientStore
from fedloom.federation.watch import Watch
from fedloom.messages.types import Payload, Update
from fedloom.recipe.recipe import Recipe
from fedloom.testing import ContractBroken, check_algorithm
from fedloom.testing.contract import CHECKS

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TABLES = (
    registry.algorithms,
    registry.corpora,
    registry.splitters,
    registry.suites,
    registry.operators,
    registry.hooks,
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def small(tiny_model: Path) -> dict[str, Any]:
    """The page's recipe for a tiny model."""
    (text,) = blocks("yaml")
    sizes = {
        "model": str(tiny_model),
        "data.max_length": 64,
        "adapter.rank": 2,
        "train.steps": 2,
        "train.lr": 1e-2,
        "federation.rounds": 2,
        "runtime.device": "cpu",
        "runtime.threads": 1,
        "evaluation.limit": 2,
        "evaluation.answers": 1,
        "evaluation.every": 0,
        "name": "spelling",
    }
    return {"values": yaml.safe_load(text), "overrides": sizes}


# ------------------------------------------------------------------ in a namespace


@pytest.fixture
def page(monkeypatch) -> dict[str, Any]:
    """What the page's Python defines, with its names in the registry for this test alone."""
    for table in TABLES:
        monkeypatch.setattr(table, "_targets", dict(table._targets))
    monkeypatch.setitem(sys.modules, "page", sys)  # classes look their module up
    space: dict[str, Any] = {"__name__": "page"}
    for code in blocks("python"):
        exec(compile(code, "docs/extending.md", "exec"), space)
    return space


def test_the_docs_import_from_the_packages_faces_only():
    """An inner module may move; what `tests/test_public_names.py` pins may not."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    code = [
        b for p in pages for b in re.findall(r"^```python\n(.*?)^```$", p.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    ]
    imports = re.findall(r"^(?:from|import) (fedloom[\w.]*)", "\n".join(code), re.MULTILINE)
    assert len(imports) >= 10
    assert [m for m in imports if m.count(".") > 1] == []


def test_the_algorithm_is_short():
    (code,) = [b for b in blocks("python") if "class SignMean" in b]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 45


def test_the_page_runs_and_each_part_does_its_work(page, tiny_model, tmp_path):
    made = small(tiny_model)
    result = fedloom.run(Recipe.parse(made["values"], made["overrides"]), out=tmp_path / "run")
    summary = result.summary
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]

    assert summary["corpus"] == "fed-spelling"
    assert (summary["score"]["suite"], summary["score"]["questions"]) == ("spelling", 8)
    assert split["splitter"] == "two-kinds"
    assert [sum(c["categories"].values()) for c in split["clients"]] == [40] * 4
    assert any(len(c["categories"]) < 4 for c in split["clients"])
    (first, second) = [e for e in events if e["event"] == "round_finished"]
    assert first["failures"] == second["failures"] == 0
    assert summary["loss"]["after"] != summary["loss"]["before"]

    told = {(e["client"], e["round"]): e["metrics"] for e in events if e["event"] == "client_update"}
    assert told == {(f"client-{c}", r): {"gentle_start/limit": r / 2} for c in (1, 2, 3, 4) for r in (1, 2)}
    assert Recipe.parse(made["values"]).hooks[0].options == {"steps": 4}  # two steps in each of two rounds

    error = ClientStore(tmp_path / "run" / "clients").load("client-1", 2)["personal"].tensors["error"]
    assert error.abs().sum() > 0
    # Up go five numbers a byte and one size, down four bytes a number; a message's header has a name for each tensor.
    messages = [e for e in events if e["event"] == "client_update" and e["round"] == 2]
    assert len(messages) == 4
    assert all(error.numel() // 5 < m["upload_bytes"] < error.numel() // 5 + 1500 for m in messages)
    plain = Recipe.parse(made["values"], {**made["overrides"], "operators": {}})
    again = fedloom.run(plain, out=tmp_path / "plain").summary
    assert again["adapter_sha256"] == summary["adapter_sha256"]  # packing loses nothing
    saved = again["cost"]["upload_bytes"] - summary["cost"]["upload_bytes"]
    assert saved > 8 * 0.7 * error.numel()  # two rounds of four clients
    assert all(m["download_bytes"] > 4 * error.numel() for m in messages)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("operators", [{}, {"up": ["fives"]}], ids=["plain", "packed"])
def test_a_killed_run_of_the_pages_algorithm_resumes_to_the_same_bits(page, tiny_model, tmp_path, operators):
    made = small(tiny_model)
    recipe = Recipe.parse(made["values"], {**made["overrides"], "federation.rounds": 3, "operators": operators})
    whole = fedloom.run(recipe, out=tmp_path / "whole").summary

    def tick(what: str, round: int, done: int, total: int) -> None:
        if (what, round, done) == ("train", 3, 1):
            raise Killed

    with pytest.raises(Killed):
        fedloom.run(recipe, out=tmp_path / "killed", watch=Watch(tick=tick))
    assert (
        fedloom.run(recipe, out=tmp_path / "killed", resume=True).summary["adapter_sha256"] == whole["adapter_sha256"]
    )
    errors = [ClientStore(tmp_path / n / "clients").load("client-1", 3)["personal"] for n in ("whole", "killed")]
    assert torch.equal(*(e.tensors["error"] for e in errors))


def test_the_page_ends_with_a_check_that_its_algorithm_passes(page):
    assert PAGE.index("\n## Check it") > PAGE.rindex("\n## An algorithm for fedloom itself")
    page["test_sign_mean_keeps_the_contract"]()
    (table,) = re.findall(r"^\| check \| what it asks \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) == list(CHECKS)


def test_momentum_in_a_plain_attribute_would_be_named(page):
    """The page warns of it: the same algorithm with the step in an attribute fails the check with the attribute's name."""
    (code,) = [b for b in blocks("python") if "class SignMean" in b]
    wrong = code.replace('self.kept.tensors.get("step", torch.zeros(()))', 'getattr(self, "step", 0.0)')
    wrong = wrong.replace('self.kept.tensors["step"] = step', "self.step = step")
    exec(compile(wrong, "docs/extending.md", "exec"), page)
    with pytest.raises(ContractBroken, match=r"the server changed self\.step in round 1"):
        check_algorithm(page["SignMean"], only=["resume"])


def test_the_algorithms_two_halves_agree(page, tiny_recipe, tmp_path):
    """What clients say and what they keep add up to what they learned; the server moves by the mean of what they say."""
    from fedloom.experiment.prepare import prepare
    from fedloom.federation.watch import Watch

    setting = prepare(tiny_recipe({"algorithm": "sign_mean"}), Watch())
    server, model = setting.algorithm, setting.model
    client = type(server)(server.options, server.seed, server.adapter)
    client.client_model(setting.models, Payload())
    wanted = torch.randn(server.shared.flat.shape, generator=torch.Generator().manual_seed(0))
    said = torch.zeros_like(wanted)
    kept = None
    for number in range(1, 41):  # the client always learns the same change; what is said of it approaches that
        client.begin("one", number, kept)
        client.receive(server.round_payload("one"))
        model.adapter.flat.add_(wanted)
        sent = client.shared_state()
        said += sent.tensors["size"] * sent.tensors["signs"]
        kept = client.client_state()
        torch.testing.assert_close(said + kept.tensors["error"], number * wanted, rtol=0, atol=1e-4)
    assert float((said / number - wanted).norm() / wanted.norm()) < 0.2  # 0.6 where the rest is thrown away
    assert sent.tensors["signs"].dtype == torch.int8

    other = Payload({"signs": -sent.tensors["signs"], "size": torch.ones(1)})
    before = server.shared.flat.clone()
    server.aggregate(iter([Update("one", 1, sent, num_examples=1), Update("two", 1, other, num_examples=3)]))
    expected = before + (sent.tensors["size"] - 3) / 4 * sent.tensors["signs"]
    torch.testing.assert_close(server.shared.flat, expected, rtol=0, atol=1e-6)


def test_the_operator_gives_back_what_it_packed_and_refuses_the_rest(page):
    from fedloom.messages.operators.base import CannotEncode
    from fedloom.messages.operators.chain import Chain
    from fedloom.messages.operators.flat import BadPayload

    chain = Chain.parse(["fives"])
    every = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * 5).flatten()
    for signs in (every, every[:7], every[:0]):
        payload = Payload({"signs": signs, "size": torch.tensor([0.3])})
        coded = chain.encode(payload)
        assert max((t.numel() for t in coded.tensors.values() if t.dtype == torch.uint8), default=0) == -(
            -len(signs) // 5
        )
        back = chain.decode(coded).tensors
        assert torch.equal(back["signs"], signs)
        assert torch.equal(back["size"], payload.tensors["size"])
    for other in (2, -128):
        with pytest.raises(CannotEncode, match="other small integers"):
            chain.encode(Payload({"signs": torch.tensor([1, other], dtype=torch.int8)}))
    coded = chain.encode(Payload({"signs": every}))
    for tensor in coded.tensors.values():
        tensor[0] = 243
    with pytest.raises(BadPayload, match="over 242"):
        chain.decode(coded)


# ------------------------------------------------------------------ as a package


def package(folder: Path, module: str = "fedloom_spelling", code: str | None = None, **project: Any) -> Path:
    """A folder that pip can build: the page's own package, or one with other code and entry points."""
    (text,) = blocks("toml")
    if project:
        groups = project.pop("points")
        lines = ["[build-system]", 'requires = ["hatchling"]', 'build-backend = "hatchling.build"', "[project]"]
        lines += [f"{k} = {json.dumps(v)}" for k, v in project.items()]
        for group, points in groups.items():
            lines += [f'[project.entry-points."fedloom.{group}"]', *(f'"{n}" = "{v}"' for n, v in points.items())]
        lines += ["[tool.hatch.build.targets.wheel]", f'include = ["{module}.py"]']
        text = "\n".join(lines) + "\n"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    own = "\n\n".join(b for b in blocks("python") if ".register(" not in b and "check_algorithm" not in b)
    (folder / f"{module}.py").write_text(own if code is None else code, encoding="utf-8")
    return folder


def install(target: Path, *folders: Path) -> None:
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), *map(str, folders)]
    subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull}
    )


BROKEN = "import a_library_that_is_not_there\n"
SWAPPED = "class FedAvg:\n    pass\n\nclass Half:\n    pass\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the page's package, and four packages with something wrong with them."""
    base = tmp_path_factory.mktemp("packages")
    odd = {
        "fedloom-broken": ("broken_plugin", BROKEN, {"algorithms": {"broken": "broken_plugin:Broken"}}),
        "fedloom-swapped": (
            "swapped_plugin", SWAPPED,
            {"algorithms": {"fedavg": "swapped_plugin:FedAvg", "half": "swapped_plugin:Half", "gone": "swapped_plugin:Gone"}},
        ),
        "fedloom-one": ("one_plugin", "", {"algorithms": {"shared-name": "one_plugin:A"}}),
        "fedloom-two": ("two_plugin", "", {"algorithms": {"shared-name": "two_plugin:B"}, "suites": {"no-suite": "math:pi"}}),
    }  # fmt: skip
    folders = [package(base / "fedloom-spelling")]
    folders += [
        package(base / name, module, code, name=name, version="0.3", points=points)
        for name, (module, code, points) in odd.items()
    ]
    install(base / "site", *folders)
    return base / "site"


@pytest.fixture
def installed(site) -> str:
    """For a process: the packages' folder on its path, as an environment with them would have it."""
    return f"import sys; sys.path.insert(0, {str(site)!r})"


def test_the_page_installs_as_a_package_with_the_names_that_it_says(site):
    found = {d.metadata["Name"]: d for d in importlib.metadata.distributions(path=[str(site)])}
    (text,) = blocks("toml")
    wanted = tomllib.loads(text)["project"]["entry-points"]
    points = found["fedloom-spelling"].entry_points
    assert {g: {p.name: p.value for p in points.select(group=g)} for g in wanted} == wanted
    assert set(wanted) == {f"fedloom.{t.group}" for t in TABLES}


def test_a_recipe_runs_with_everything_from_an_installed_package(site, tiny_model, tmp_path):
    """In a process of its own that knows the package only because it is installed."""
    made = small(tiny_model)
    recipe = tmp_path / "spelling.yaml"
    recipe.write_text(Recipe.parse(made["values"], made["overrides"]).to_yaml(), encoding="utf-8")
    path = os.pathsep.join([str(site), str(ROOT)])
    command = [sys.executable, "-m", "fedloom", "run", str(recipe), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["corpus"] == "fed-spelling"
    assert summary["score"]["suite"] == "spelling"
    assert "claims" not in done.stderr  # nobody is told of packages that they do not use
    assert "cannot be imported" not in done.stderr


def test_the_list_has_the_packages_algorithm_and_says_what_it_left_out(cli, installed):
    done = cli("algorithms", setup=installed)
    assert done.code == 0
    (row,) = [line for line in done.out.splitlines() if line.startswith("sign_mean")]
    assert "signs up; adapter down" in row
    assert "2.4 MB" in row  # a quarter of 9.8
    left_out = [line for line in done.err.splitlines() if line.startswith("left out: ")]
    assert [re.search(r"algorithm '(\S+)'", line)[1] for line in left_out] == ["broken", "gone", "half", "shared-name"]
    assert done.err.count("'fedavg' is fedloom's own; package fedloom-swapped 0.3") == 1
    assert len(re.findall(r"^fedavg ", done.out, re.MULTILINE)) == 1


def test_a_package_that_cannot_be_imported_fails_where_it_is_used_and_nowhere_else(cli, installed, recipe_file):
    done = cli("run", recipe_file({"algorithm": "broken"}), "--out", "run", setup=installed)
    assert done.code == 2
    assert done.sentence.startswith("algorithm 'broken' comes from package fedloom-broken 0.3 (broken_plugin:Broken), ")
    assert "ModuleNotFoundError: No module named 'a_library_that_is_not_there' at " in done.sentence
    assert "broken_plugin.py:1" in done.sentence
    assert not (cli.cwd / "run").exists()
    gone = cli("algorithms", "gone", setup=installed)
    assert (gone.code, "AttributeError" in gone.sentence) == (2, True)


def test_two_packages_with_one_name_are_named_both(cli, installed, recipe_file):
    done = cli("run", recipe_file({"algorithm": "shared-name"}), "--out", "run", setup=installed)
    assert done.code == 2
    assert done.sentence == (
        "algorithm 'shared-name' is claimed by packages fedloom-one 0.3 (one_plugin:A) and fedloom-two 0.3 "
        "(two_plugin:B): uninstall all of them but one"
    )


def test_what_is_no_algorithm_is_refused(cli, installed, recipe_file):
    done = cli("run", recipe_file({"algorithm": "half"}), "--out", "run", setup=installed)
    assert done.code == 2
    assert "is the class Half, not a subclass of Algorithm (fedloom.algorithms.base:Algorithm)" in done.sentence
    suite = cli("run", recipe_file({"evaluation.suite": "no-suite"}), "--out", "run", setup=installed)
    assert suite.code == 2
    assert "is a float, not a Suite" in suite.sentence


def test_a_name_of_fedlooms_own_stays_its_own_and_the_user_is_told_once(cli, installed, recipe_file, tmp_path):
    plain = cli("run", recipe_file(), "--out", "plain")
    done = cli("run", recipe_file(), "--out", "run", setup=installed)
    assert (plain.code, done.code) == (0, 0)
    assert (
        done.err.count("algorithm 'fedavg' is fedloom's own; package fedloom-swapped 0.3 (swapped_plugin:FedAvg)") == 1
    )
    assert "claims" not in plain.err
    digests = [json.loads((tmp_path / n / "summary.json").read_text())["adapter_sha256"] for n in ("plain", "run")]
    assert digests[0] == digests[1]


def test_a_near_miss_of_a_packages_name_is_suggested(cli, installed):
    done = cli("algorithms", "sign_men", setup=installed)
    assert (done.code, done.sentence) == (2, "unknown algorithm 'sign_men': did you mean sign_mean?")


def test_a_class_that_leaves_the_aggregation_out_is_refused(monkeypatch):
    from fedloom.algorithms.base import Algorithm
    from fedloom.common.errors import UserError

    class Unfinished(Algorithm):
        pass

    monkeypatch.setitem(registry.algorithms._targets, "unfinished", Unfinished)
    with pytest.raises(UserError, match="'unfinished' does not say aggregate: write that method"):
        registry.algorithms.get("unfinished")
