"""Imports point one way and form no circle, each library has one home, and nothing that can carry code is read."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

import fedloom
from tests.helpers.imports import Source

#: A package imports packages of lower layers; those of one layer do not know each other.
LAYERS = [
    {"common"},
    {"recipe"},
    {"data", "messages"},
    {"models"},
    {"training", "evaluation"},
    {"algorithms"},
    {"federation"},
    {"runtimes", "reporting"},
    {"experiment"},
    {"cli", "testing"},
    {"__main__"},
]

#: Library → the files that may import it.
HOMES = {
    "peft": ("models/",),
    "lm_eval": ("evaluation/public/harness.py",),
    "nvflare": ("runtimes/sites/flare/",),
    "ray": ("runtimes/ray.py",),
    "reasoning_gym": ("data/corpora/", "evaluation/"),
    "datasets": ("data/",),
    "gguf": ("models/",),
    "typer": ("cli/",),
    "transformers": ("models/", "data/prompts.py", "data/tokenization.py", "evaluation/", "training/flops.py"),
    "jinja2": ("reporting/",),
    "flash_attn": ("models/",),
    "dp_accounting": ("algorithms/privacy/",),
    "scipy": ("algorithms/privacy/",),
    "fcntl": ("common/files.py",),
    "zstandard": ("messages/operators/compress.py",),
    "lz4": ("messages/operators/compress.py",),
}

#: Never, anywhere: each of these can run what it reads.
BANNED_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
BANNED_CALLS = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load"), ("yaml", "load")}

SOURCE = Source(Path(fedloom.__file__).parent)
FILES, name, imported, parsed = SOURCE.files, SOURCE.name, SOURCE.imported, SOURCE.parsed


def test_every_package_has_a_layer_and_every_layer_is_of_packages_that_exist():
    parts = {SOURCE.part(SOURCE.module(p)) for p in FILES} - {"fedloom"}
    assert parts == set().union(*LAYERS), "keep LAYERS in step with the packages"
    assert sum(map(len, LAYERS)) == len(parts), "a package has one layer"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    """Those inside functions too."""
    assert not SOURCE.misplaced(path, LAYERS), f"{name(path)} imports from a layer above it, or from beside it"


def test_modules_import_no_circle():
    assert not SOURCE.circles()


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library):
    strangers = [
        f"{name(path)}:{line}"
        for path in FILES
        for module, line in imported(path)
        if module.split(".")[0] == library and not name(path).startswith(HOMES[library])
    ]
    assert not strangers


def test_an_algorithm_does_not_know_runtimes_nor_a_runtime_algorithms():
    for path in FILES:
        top = name(path).split("/")[0]
        modules = [m for m, _ in imported(path)]
        if top in {"algorithms", "training"}:
            assert not [m for m in modules if m.startswith(("fedloom.runtimes", "fedloom.federation.client"))], name(
                path
            )
        if top in {"runtimes", "training"}:
            assert not [m for m in modules if m.startswith("fedloom.algorithms")], name(path)


def test_no_branch_on_a_name_outside_its_own_folder():
    """`if algorithm == "fedavg"` belongs into algorithms/, a runtime's name into runtimes/ (STYLE.md 4)."""
    from fedloom.common import registry

    names = {"algorithms": set(registry.algorithms.names()), "runtimes": set(registry.runtimes.names())}
    found = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Compare):
                continue
            constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
            for folder, known in names.items():
                if constants & known and not name(path).startswith(f"{folder}/"):
                    found.append(f"{name(path)}:{node.lineno} {ast.unparse(node)}")
    assert not found


def test_nothing_that_can_carry_code_is_read_or_written():
    found = []
    for path in FILES:
        found += [f"{name(path)}:{line} {m}" for m, line in imported(path) if m.split(".")[0] in BANNED_MODULES]
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = (ast.unparse(node.func.value), node.func.attr)
                if call in BANNED_CALLS:
                    found.append(f"{name(path)}:{node.lineno} {'.'.join(call)}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                found.append(f"{name(path)}:{node.lineno} {node.func.id}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value), f"{name(path)}:{node.lineno}"
    assert not found


def test_failures_are_not_swallowed():
    """No bare except, and no `except Exception: pass` (STYLE.md 7)."""
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            assert node.type is not None, f"{name(path)}:{node.lineno} is a bare except"
            if ast.unparse(node.type) in {"Exception", "BaseException"}:
                passed = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                assert not passed, f"{name(path)}:{node.lineno} swallows every error"


def test_every_file_says_its_one_idea():
    silent = [
        name(path)
        for path in FILES
        if path.stat().st_size and not ast.get_docstring(parsed(path)) and path.name != "__main__.py"
    ]
    assert not silent


def source(tmp_path: Path, code: str) -> tuple[Source, Path]:
    path = tmp_path / "fedloom" / "models" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(code)
    return Source(tmp_path / "fedloom"), path


def test_an_import_in_a_function_counts_and_one_for_the_type_checker_does_not(tmp_path):
    found, path = source(
        tmp_path,
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft\n"
        "def f():\n    import ray\n    from fedloom import cli\n    import_module('lm_eval')\n",
    )
    (tmp_path / "fedloom" / "cli.py").touch()
    assert [m for m, _ in Source(found.root).imported(path)] == ["typing", "ray", "fedloom.cli", "lm_eval"]


@pytest.fixture
def copied(tmp_path):
    """The package's own files, to break."""
    return shutil.copytree(SOURCE.root, tmp_path / "fedloom", ignore=shutil.ignore_patterns("__pycache__"))


BROKEN = {
    "messages/types.py": "from fedloom.federation.client import Client",
    "messages/at_rest.py": "def f():\n    from fedloom.federation import client",
    "messages/wire.py": "from fedloom.data.corpus import Corpus",  # data is of the same layer
    "data/corpus.py": "import_module('fedloom.cli.app')",
    "common/files.py": "import fedloom",
    "evaluation/loss.py": "import fedloom.training.trainer",
}


def test_an_import_from_above_or_beside_is_found(copied):
    for file, line in BROKEN.items():
        (copied / file).write_text(f"{(copied / file).read_text()}\n{line}\n")
    found = Source(copied)
    assert {found.name(p) for p in found.files if found.misplaced(p, LAYERS)} == set(BROKEN)


def test_a_circle_is_found(copied):
    """One that is closed in a function, and one of three new modules; an import for the type checker closes none."""
    assert "from fedloom.messages.types import" in (copied / "messages" / "wire.py").read_text()
    types = copied / "messages" / "types.py"
    types.write_text(types.read_text() + "\n\ndef f():\n    from fedloom.messages import wire\n")
    texts = {
        "a": "from fedloom.recipe import b",
        "b": "from fedloom.recipe import c",
        "c": "if True:\n    import fedloom.recipe.a",
        "d": "from fedloom.recipe import e",
        "e": "if TYPE_CHECKING:\n    from fedloom.recipe import d",
    }
    for module, text in texts.items():
        (copied / "recipe" / f"{module}.py").write_text(text)
    first, second = Source(copied).circles()
    assert first[0] == first[-1] and {"fedloom.messages.types", "fedloom.messages.wire"} <= set(first)
    assert second == ["fedloom.recipe.a", "fedloom.recipe.b", "fedloom.recipe.c", "fedloom.recipe.a"]
