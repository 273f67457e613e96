"""Imports point one way, each library has one home, and nothing that can carry code is read (DESIGN.md 4 and 5)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fedloom

ROOT = Path(fedloom.__file__).parent

#: Part → its layer; an import points to the same layer or to a lower one. Files at the top level have a part each.
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
    {"cli", "__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

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

FILES = sorted(ROOT.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part(module: str) -> str:
    """fedloom.data.hub → data; fedloom.cli.runs → cli."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "fedloom"


def imported(path: Path, *, at_runtime: bool = True) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, those inside functions too; not those under `if TYPE_CHECKING`."""
    tree = parsed(path)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if at_runtime and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)}:{node.lineno} imports relatively"
            assert node.module
            if node.module == "fedloom":
                yield from ((f"fedloom.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            (target, *_) = node.args
            if isinstance(target, ast.Constant):
                yield target.value, node.lineno


def test_every_file_has_a_layer():
    parts = {part("fedloom." + name(p).removesuffix(".py").replace("/", ".")) for p in FILES} - {"__init__"}
    assert parts <= set(LEVEL), f"give {sorted(parts - set(LEVEL))} a place in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    own = part("fedloom." + name(path).removesuffix(".py").replace("/", "."))
    if own == "__init__":
        return
    upwards = [
        f"line {line}: {module}"
        for module, line in imported(path)
        if module.startswith("fedloom.") and LEVEL.get(part(module), -1) > LEVEL[own]
    ]
    assert not upwards, f"{name(path)} imports from a layer above it: {upwards}"


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


def test_the_test_finds_what_it_looks_for(tmp_path):
    """The finder itself: an import in a function counts, one for the type checker does not."""
    path = tmp_path / "x.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft\n"
        "def f():\n    import ray\n    from fedloom import cli\n    import_module('lm_eval')\n"
    )
    assert [m for m, _ in imported(path)] == ["typing", "ray", "fedloom.cli", "lm_eval"]
