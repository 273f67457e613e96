"""The suite's own bookkeeping: what was left out and skipped is listed, and in CI a skip without a good reason fails."""

from __future__ import annotations

import pytest

from tests.helpers.skips import TARGETS

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_runs(): pass

def test_tool(): pytest.skip("bwrap is not here")

def test_data(): pytest.skip("FEDLOOM_DATA is not set")

@pytest.mark.skipif(True, reason="no compiler")
def test_marked(): pass

@pytest.mark.xfail
def test_expected(): assert False

@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_slow(number): pass

@pytest.mark.faults
def test_fault(): pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("FEDLOOM_CI", raising=False)
    markers = "".join(f"    {name}: a marker\n" for name in TARGETS)
    pytester.makeini(f"[pytest]\naddopts = -p tests.helpers.skips -p no:cacheprovider\nmarkers =\n{markers}")
    pytester.makepyfile(TESTS)
    return pytester


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_what_did_not_run_is_listed(suite, workers):
    run = suite.runpytest if workers else suite.runpytest_inprocess
    done = run("-m", "not slow and not faults", *workers)
    done.assert_outcomes(passed=1, skipped=3, xfailed=1, deselected=0 if workers else 4)
    done.stdout.fnmatch_lines([
        "*what did not run*",
        "    3 left out, run by `make test-slow`",
        "    1 left out, run by `make test-faults`",
        "    1 skipped: FEDLOOM_DATA is not set",
        "    1 skipped: bwrap is not here",
        "    1 skipped: no compiler",
    ])  # fmt: skip


def test_nothing_is_said_where_everything_ran(suite):
    done = suite.runpytest_inprocess("-k", "runs or expected")
    assert "did not run" not in done.stdout.str()


def test_in_ci_only_allowed_reasons_pass(suite, monkeypatch):
    monkeypatch.setenv("FEDLOOM_CI", "1")
    done = suite.runpytest_inprocess()
    done.assert_outcomes(passed=5, failed=1, errors=1, skipped=1, xfailed=1)  # an error where a marker skips
    done.stdout.fnmatch_lines_random([
        "*With FEDLOOM_CI=1 this may not be skipped: bwrap is not here. Install what it needs.",
        "*With FEDLOOM_CI=1 this may not be skipped: no compiler. Install what it needs.",
        "    1 skipped: FEDLOOM_DATA is not set",
    ])  # fmt: skip


def test_in_ci_a_module_that_skips_itself_fails(suite, monkeypatch):
    suite.makepyfile(test_whole="import pytest\npytest.importorskip('a_library_that_is_missing')\n")
    suite.runpytest_inprocess("test_whole.py").assert_outcomes(skipped=1)
    monkeypatch.setenv("FEDLOOM_CI", "1")
    done = suite.runpytest_inprocess("test_whole.py")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*may not be skipped: could not import 'a_library_that_is_missing'*"])
