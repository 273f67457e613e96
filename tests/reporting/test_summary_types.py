"""summary.json and its types have the same keys, and a folder without a summary has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from fedloom import run
from fedloom.data.splitters import SplitTable
from fedloom.evaluation.samples import Answers
from fedloom.federation.record.run_folder import RunFolder
from fedloom.reporting.summary_types import Summary, read_summary


def differences(value: Any, kind: Any, where: str = "") -> list[str]:
    """Keys that the value lacks or has beyond its type, at any depth."""
    if get_origin(kind) in {Union, UnionType}:
        options = [o for o in get_args(kind) if o is not type(None)]
        return [] if value is None else differences(value, options[0], where)
    if get_origin(kind) is list:
        return [d for i, item in enumerate(value) for d in differences(item, get_args(kind)[0], f"{where}[{i}]")]
    if get_origin(kind) is dict and is_typeddict(get_args(kind)[1]):
        return [d for key, item in value.items() for d in differences(item, get_args(kind)[1], f"{where}.{key}")]
    if not is_typeddict(kind):
        return []
    assert isinstance(value, Mapping), where
    hints = get_type_hints(kind)
    found = [f"{where}: {sorted(set(value) ^ set(hints))}"] if set(value) != set(hints) else []
    return found + [d for key in set(value) & set(hints) for d in differences(value[key], hints[key], f"{where}.{key}")]


def test_the_files_of_a_run_have_the_keys_of_their_types(tiny_recipe, tmp_path):
    result = run(tiny_recipe({"federation.rounds": 1, "evaluation.answers": 1}), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert read_summary(folder) == json.loads(json.dumps(result.summary))
    assert differences(read_summary(folder), Summary) == []
    assert differences(folder.read("split.json"), SplitTable) == []
    assert differences(folder.read("answers.json"), Answers) == []


def test_the_comparison_sees_a_key_at_any_depth():
    assert differences({"suite": None, "answers": [{"client": "a"}]}, Answers)
    assert differences({"suite": None, "answers": [], "more": 1}, Answers) == [": ['more']"]


def test_an_unfinished_run_has_no_summary(tmp_path):
    assert read_summary(RunFolder(tmp_path)) is None
    (tmp_path / "summary.json").write_text('{"name": ')
    assert read_summary(RunFolder(tmp_path)) is None
