"""The docs say what is true now: generated pages match the schema, links lead somewhere, recipes say what they show."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fedloom.algorithms.build import make
from tests.helpers import ROOT
from fedloom.cli.app import app
from fedloom.common import registry
from fedloom.federation.checks import check_algorithm
from fedloom.recipe.library import builtin_recipes
from fedloom.recipe.recipe import Recipe

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def test_the_generated_pages_are_what_the_code_says():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    pages = generate.pages()
    assert {p.relative_to(ROOT).as_posix() for p in pages} == {
        "docs/recipes.md",
        "docs/refusals.md",
        "docs/algorithms/README.md",
    }
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, "run `make docs`"
    table = (ROOT / "docs" / "algorithms" / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in table for name in registry.algorithms.names())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not (page.parent / t).exists()]
    assert not missing


#: Pages whose code paths are relative to fedloom/.
WITH_PATHS = ["docs/architecture.md", "docs/one-round.md"]


@pytest.mark.parametrize("name", WITH_PATHS)
def test_code_paths_of_a_page_lead_to_files(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)`", text))
    missing = [p for p in sorted(paths) if not ((ROOT / "fedloom" / p).exists() or (ROOT / p).exists())]
    assert len(paths) > 10
    assert not missing


def test_the_page_on_one_round_names_twelve_files_and_what_to_look_at_in_them():
    text = (ROOT / "docs" / "one-round.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `([\w/]+\.py)` \| `([\w.]+)` \|", text, re.MULTILINE)
    assert [number for number, _, _ in rows] == [str(n) for n in range(1, len(rows) + 1)]
    assert 8 <= len(rows) <= 12
    for _, path, wanted in rows:
        code = (ROOT / "fedloom" / path).read_text(encoding="utf-8")
        for name in wanted.split("."):
            assert re.search(rf"^\s*(?:def|class) {name}\b", code, re.MULTILINE), (path, wanted)


@pytest.mark.parametrize("path", builtin_recipes().values(), ids=lambda p: p.stem)
def test_a_recipe_says_what_it_shows_and_how_long_it_takes(path):
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert head[0].startswith("# What it shows: ")
    assert any(line.startswith("# How long: ") for line in head)


@pytest.mark.parametrize("path", builtin_recipes().values(), ids=lambda p: p.stem)
def test_a_recipes_algorithm_takes_its_settings(path):
    recipe = Recipe.load(path)
    check_algorithm(recipe)
    assert make(recipe).options == make(Recipe.parse(recipe.resolved())).options


def test_every_family_of_algorithms_has_a_recipe():
    shown = {
        registry.algorithms.get(Recipe.load(path).algorithm.name).about.family for path in builtin_recipes().values()
    }
    families = {registry.algorithms.get(name).about.family for name in registry.algorithms.names()}
    assert shown == families


def test_the_readme_names_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {command.name for command in app.registered_commands}
    missing = [name for name in names if f"fedloom {name}" not in readme]
    assert names >= {"run", "evaluate", "report"}
    assert not missing


def fault_table() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(fault, outcome, its tests) of docs/operations.md."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = page[page.index("| fault | outcome | test") :].split("\n\n")[0].splitlines()[2:]
    cells = [row.strip("|").split("|") for row in rows]
    return [(f.strip(), o.strip(), re.findall(r"`([\w/]+\.py)::(test_\w+)`", t)) for f, o, t in cells]


@pytest.mark.parametrize(("fault", "outcome", "named"), fault_table(), ids=lambda cell: cell[:40] if cell else None)
def test_a_row_of_the_fault_table_names_tests_that_exist_and_speak_of_its_codes(fault, outcome, named):
    assert named
    code = ""
    for path, test in named:
        text = (ROOT / "tests" / path).read_text(encoding="utf-8")
        assert len(re.findall(rf"^def {test}\(", text, re.MULTILINE)) == 1, (path, test)
        code += text
    for said in re.findall(r"`([a-z_]+)`", outcome):
        if said != "min_clients":
            assert f'"{said}"' in code, said


#: What has to have a row, by words of its fault.
FAULTS = (
    "SIGKILL of a trainer", "SIGKILL of a site's job", "SIGKILL of the server's job", "`fedloom serve` itself", "hangs", "slow",
    "full disk", "truncated", "oversized", "bit-flipped", "replayed", "wrong names", "wrong shapes", "decompression bomb",
    "certificate of another authority, or none", "fewer updates than `min_clients`", "site's host that is lost", "revoked",
)  # fmt: skip


def test_every_fault_that_was_promised_has_a_row():
    rows = [fault for fault, _, _ in fault_table()]
    assert [words for words in FAULTS if not any(words in fault for fault in rows)] == []
