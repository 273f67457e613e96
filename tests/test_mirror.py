"""A module's tests are found by its path: fedloom/messages/wire.py has tests/messages/test_wire.py."""

from __future__ import annotations

from pathlib import Path

import fedloom
from tests.helpers import ROOT

PACKAGE = Path(fedloom.__file__).parent
TESTS = ROOT / "tests"

#: Folders whose tests are about a whole behaviour, or about something beside the package.
BEHAVIOURS = {
    "benchmarks",
    "commands",
    "containers",
    "contracts",
    "docs",
    "faults",
    "helpers",
    "llama_cpp",
    "runs",
    "slow",
}

#: Packages that are one thing in several files: tests/federation/test_checks.py is about all of federation/checks/.
WHOLE = {"federation/checks"}

#: Modules without a test file of their own. The list may only shrink: a new module comes with its tests.
UNTESTED = [
    "algorithms/averaging/diloco",
    "algorithms/build",
    "algorithms/catalogue",
    "algorithms/freezing",
    "algorithms/lora/base_delta",
    "algorithms/low_traffic/fedmezo",
    "algorithms/low_traffic/history",
    "algorithms/offsite/alignment",
    "algorithms/offsite/fedavg_outer",
    "algorithms/offsite/fedbiot",
    "algorithms/personal/fedrep",
    "algorithms/personal/turns",
    "algorithms/privacy/plan",
    "algorithms/robust/geometric_median",
    "algorithms/robust/norm_bound",
    "cli/app",
    "cli/benchmark_tables",
    "cli/benchmarks",
    "cli/console",
    "cli/fetch",
    "cli/main",
    "cli/runs",
    "cli/sites",
    "common/cache_folder",
    "common/errors",
    "common/files",
    "common/randomness",
    "common/registry",
    "common/version",
    "common/yaml",
    "data/clusters",
    "data/corpora/alpaca",
    "data/corpora/codealpaca",
    "data/corpora/dolly",
    "data/corpora/gsm8k",
    "data/corpora/gsm_symbolic",
    "data/corpora/medmcqa",
    "data/corpora/preferences",
    "data/corpora/skills",
    "data/corpus",
    "data/federated",
    "data/files",
    "data/heterogeneity",
    "data/hub",
    "data/loading",
    "data/own_files",
    "data/shard_file",
    "evaluation/loss",
    "evaluation/pick_suite",
    "evaluation/public/datasets",
    "evaluation/public/documents",
    "evaluation/public/readers",
    "evaluation/public/suites",
    "evaluation/samples",
    "evaluation/sandbox/bubblewrap",
    "evaluation/sandbox/programs",
    "experiment/assemble",
    "experiment/benchmark/columns",
    "experiment/benchmark/declaration",
    "experiment/benchmark/page",
    "experiment/benchmark/ratios",
    "experiment/benchmark/table",
    "experiment/evaluate",
    "experiment/local_sites",
    "experiment/prepare",
    "experiment/site_data",
    "experiment/sites",
    "federation/client",
    "federation/cohorts",
    "federation/coordinator",
    "federation/evaluator",
    "federation/hooks/base",
    "federation/hooks/ema",
    "federation/hooks/gradient_noise",
    "federation/hooks/validation_loss",
    "federation/record/run_folder",
    "federation/results",
    "federation/rounds/dispatcher",
    "federation/watch",
    "federation/workplace",
    "messages/limits",
    "messages/operators/base",
    "messages/operators/cast",
    "messages/operators/delta",
    "messages/types",
    "models/attach",
    "models/attention/packed",
    "models/base_delta",
    "models/gguf/vocabulary",
    "models/layers",
    "models/random_model",
    "models/saved",
    "models/sharding",
    "models/virtual_tokens",
    "recipe/devices",
    "recipe/library",
    "recipe/overrides",
    "recipe/privacy",
    "recipe/sections",
    "recipe/train",
    "reporting/charts",
    "reporting/differences",
    "reporting/export",
    "reporting/loaded_run",
    "reporting/matrix",
    "reporting/scatter",
    "reporting/summary",
    "reporting/usage",
    "runtimes/doctor",
    "runtimes/ranks/main",
    "runtimes/ranks/rank",
    "runtimes/ray_host",
    "runtimes/sites/agent",
    "runtimes/sites/checks",
    "runtimes/sites/flare/controller",
    "runtimes/sites/flare/executor",
    "runtimes/sites/flare/launcher",
    "runtimes/sites/flare/link",
    "runtimes/sites/flare/services",
    "runtimes/sites/join",
    "runtimes/sites/link",
    "runtimes/sites/project",
    "runtimes/sites/supervisor",
    "runtimes/versions",
    "training/cohort_probe",
    "training/lockstep",
    "training/probes",
]


def modules(package: Path) -> set[str]:
    """messages/wire, …: every module but the `__init__` and `__main__` files."""
    paths = (p.relative_to(package).with_suffix("").as_posix() for p in package.rglob("*.py"))
    single = {p for p in paths if not p.rsplit("/", 1)[-1].startswith("__")}
    return {next((w for w in WHOLE if p.startswith(f"{w}/")), p) for p in single}


def mirrored(test: str, known: set[str]) -> str | None:
    """The module of messages/test_wire.py or of messages/test_wire_streaming.py: the longest name that fits."""
    folder, _, name = test.removesuffix(".py").rpartition("/")
    stem = name.removeprefix("test_")
    fits = [m for m in known if m.rpartition("/")[0] == folder and f"{stem}_".startswith(m.rpartition("/")[2] + "_")]
    return max(fits, key=len, default=None)


def own_files() -> list[str]:
    paths = (p.relative_to(TESTS) for p in TESTS.rglob("test_*.py"))
    return sorted(p.as_posix() for p in paths if len(p.parts) > 1 and p.parts[0] not in BEHAVIOURS)


def test_every_test_file_names_a_module():
    known = modules(PACKAGE)
    strangers = [t for t in own_files() if mirrored(t, known) is None]
    assert not strangers, (
        f"{strangers} name no module of fedloom. tests/PACKAGE/test_MODULE.py or test_MODULE_ASPECT.py is about one module; "
        f"a test of a whole behaviour belongs into one of {sorted(BEHAVIOURS)}."
    )


def test_every_module_has_a_test_file_or_stands_in_the_list():
    known = modules(PACKAGE)
    tested = {mirrored(t, known) for t in own_files()}
    assert sorted(UNTESTED) == UNTESTED, "keep the list in order"
    assert len(set(UNTESTED)) == len(UNTESTED)
    missing = sorted(known - tested - set(UNTESTED))
    assert not missing, f"write tests/…/test_….py for {missing}"
    gone = sorted(set(UNTESTED) - known)
    assert not gone, f"{gone} are no modules any more: take them out of UNTESTED"
    surplus = sorted(set(UNTESTED) & tested)
    assert not surplus, f"{surplus} have tests now: take them out of UNTESTED"


def test_helpers_are_not_tests():
    assert not list((TESTS / "helpers").rglob("test_*.py"))


def test_a_name_fits_the_longest_module():
    known = {"models/base", "models/base_delta", "base"}
    assert mirrored("models/test_base.py", known) == "models/base"
    assert mirrored("models/test_base_delta.py", known) == "models/base_delta"
    assert mirrored("models/test_base_rank.py", known) == "models/base"
    assert mirrored("models/test_bases.py", known) is None
    assert mirrored("test_base.py", known) == "base"
    assert mirrored("data/test_base.py", known) is None
