"""What surrounds the code (hooks, workflow, CONTRIBUTING) calls make targets that exist, and runs every step of `make check`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.test_layers import LAYERS

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
STEPS = set(re.search(r"^check: ([a-z -]+?) *##", MAKEFILE, re.MULTILINE).group(1).split())


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def code_of(page: str) -> str:
    """The commands of a page: fenced blocks and `inline code`."""
    return "\n".join([*re.findall(r"```\w*\n(.*?)```", page, re.DOTALL), *re.findall(r"`([^`\n]+)`", page)])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md"])
def test_a_page_calls_make_targets_that_exist(page):
    called = {t for line in re.findall(r"\bmake ([a-z -]+)", code_of(read(page))) for t in line.split()}
    assert called - TARGETS == set()


def test_hooks_run_every_step_of_check_and_fetch_nothing():
    (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local"
    assert {hook["entry"] for hook in repo["hooks"]} == {f"make {step}" for step in STEPS}
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}


def test_the_workflow_runs_every_step_of_check():
    job = yaml.safe_load(read(".github/workflows/check.yml"))["jobs"]["check"]
    assert set(job["strategy"]["matrix"]["target"]) == STEPS
    assert job["steps"][-1]["run"] == "make ${{ matrix.target }}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_a_table_of_layers_is_that_of_the_layers_test(page):
    rows = re.findall(r"^\| (\d+) \| `(\w+)/` \|", read(page), re.MULTILINE)
    layers = [(level, part) for level, parts in enumerate(LAYERS, 1) for part in parts]
    packages = {(level, part) for level, part in layers if (ROOT / "fedloom" / part).is_dir() and part != "testing"}
    assert sorted((int(level), part) for level, part in rows) == sorted(packages)


def test_the_citation_has_what_the_format_wants():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["license"] == "Apache-2.0"
