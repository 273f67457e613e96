"""Programs of known answers: right ones pass, empty ones do not, in each language, through what the task files call."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedloom.common.errors import UserError
from fedloom.evaluation.public import documents as asked
from fedloom.evaluation.sandbox.bubblewrap import Bubblewrap
from fedloom.evaluation.sandbox.languages import LANGUAGES, check_runs
from fedloom.evaluation.sandbox.programs import Outcome

trouble = Bubblewrap().trouble()
needs_sandbox = pytest.mark.skipif(bool(trouble), reason=trouble)
DATA = os.environ.get("FEDLOOM_DATA", "")

RECORDS = [
    {
        "task_id": f"HumanEval/{i}",
        "prompt": f'def f(x):\n    """{said}"""\n',
        "canonical_solution": f"    return {body}\n",
        "test": f"def check(f):\n    assert f(3) == {result}\n",
        "entry_point": "f",
    }
    for i, (said, body, result) in enumerate([("next", "x + 1", 4), ("square", "x * x", 9), ("minus", "-x", -3)])
]


def passed(records: list[Mapping[str, Any]], answers: list[list[str]]) -> list[list[bool]]:
    return asked.run_programs(answers, [{"record": record, "allow_unsafe": False} for record in records])


@needs_sandbox
def test_right_answers_pass_and_empty_ones_do_not():
    right = [record["canonical_solution"] for record in RECORDS]
    wrong = "    return None\n"
    early = "    raise SystemExit(0)\n"  # an end before the tests is no pass
    assert passed(RECORDS, [[answer, "", wrong, early] for answer in right]) == [[True, False, False, False]] * 3
    marks = [asked.mark_programs({}, [each]) for each in passed(RECORDS, [[answer] for answer in right])]
    assert marks == [{"pass@1": 1.0}] * 3
    assert asked.mark_programs({}, [[True] + [False] * 19]) == {
        "pass@1": pytest.approx(0.05),
        "pass@10": pytest.approx(0.5),
    }


class Elsewhere:
    """A sandbox in which nothing is installed."""

    name = "elsewhere"
    tools_at = "on the moon"

    def run(self, program):
        return Outcome("ended", 127, "python3: not found")


def test_a_language_that_does_not_run_in_the_sandbox_is_refused_before_a_model_is_asked():
    with pytest.raises(
        UserError,
        match=r"python programs do not run in the sandbox here \(elsewhere\): the right answer to HumanEval/\d did not pass "
        r"\(python3: not found\): install python3 on the moon, or leave python out$",
    ):
        check_runs(Elsewhere(), RECORDS)
    check_runs(Elsewhere(), [{**RECORDS[0], "canonical_solution": ""}])  # nothing to try


@needs_sandbox
def test_one_right_answer_that_passes_is_enough():
    check_runs(Bubblewrap(), [{**RECORDS[0], "canonical_solution": "    return None\n"}, *RECORDS[1:]])
    wrong = [{**record, "canonical_solution": "    return None\n"} for record in RECORDS]
    with pytest.raises(UserError, match="the right answer to HumanEval/2 did not pass"):
        check_runs(Bubblewrap(), wrong)


@needs_sandbox
def test_answers_of_a_brace_language_may_go_on(tmp_path):
    if LANGUAGES["js"].missing():
        pytest.skip("node is not installed")
    record = {"task_id": "JavaScript/0", "prompt": "const f = (x) => {\n", "test": "console.assert(f(2) === 4)\n"}
    answers = ["  return x * 2\n}\nprocess.exit(0)", "  return x\n}\n", "  return x * 2\n"]
    assert passed([record], [answers]) == [[True, False, False]]


def test_no_sandbox_is_refused_before_anything_is_asked(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    folder = tmp_path / "humaneval"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    asked._sandbox.cache_clear()
    with pytest.raises(UserError, match=r"none works here .* --allow-unsafe"):
        asked.load("humaneval", pretrained=str(tiny_model))
    asked._sandbox.cache_clear()


def records(path: str) -> list[dict[str, Any]]:
    with gzip.open(Path(DATA) / path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.slow
@needs_sandbox
@pytest.mark.skipif(not DATA, reason="FEDLOOM_DATA is not set")
def test_humaneval_canonical_all_and_empty_none():
    rows = records("humaneval/HumanEval.jsonl.gz")
    ran = passed(rows, [[row["canonical_solution"], ""] for row in rows])
    assert [sum(column) for column in zip(*ran, strict=True)] == [164, 0]


@pytest.mark.slow
@needs_sandbox
@pytest.mark.skipif(not DATA, reason="FEDLOOM_DATA is not set")
@pytest.mark.parametrize("name", sorted(LANGUAGES))
def test_humaneval_x_canonical(name):
    if missing := LANGUAGES[name].missing():
        pytest.skip(f"{' and '.join(missing)} not installed")
    rows = records(f"humaneval-x/humaneval_{name}.jsonl.gz")
    ran = passed(rows, [[row["canonical_solution"] + "\n"] for row in rows])
    assert sum(one for (one,) in ran) >= 0.98 * len(rows)
