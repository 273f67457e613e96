"""A recipe's method switched on the command line: the run, its numbers again, and what can be exported."""

from __future__ import annotations

import json

import pytest

from tests.helpers.scored import SCORED, SUITE

#: Overrides → (format that the method does not have, words of the refusal).
SWITCHES = {
    "prompt_tuning": (["adapter.virtual_tokens=4"], "merged", "virtual tokens are no change of the model's weights"),
    "prefix_tuning": (["adapter.prefix_projection=true"], "merged", "use --format peft"),
    "ia3": ([], None, ""),
    "full": (["train.lr=1e-3"], "peft", "use --format merged"),
}


@pytest.mark.parametrize("method", SWITCHES)
def test_a_run_of_another_method_is_measured_again_alike(cli, recipe_file, tmp_path, method):
    more, lacking, words = SWITCHES[method]
    done = cli("run", recipe_file(SCORED), f"adapter.method={method}", *more, "--out", "run", setup=SUITE)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["adapter"]["method"] == method
    done = cli("evaluate", "run", "--out", "after.json", setup=SUITE)
    assert done.code == 0, done.err
    after = json.loads((tmp_path / "after.json").read_text())
    assert after["loss"] == pytest.approx(summary["loss"]["after"], rel=1e-5)
    assert (after["score"], after["questions"]) == (summary["score"]["after"], summary["score"]["questions"])
    for format in ("peft", "merged"):
        done = cli("export", "run", "--format", format)
        if format != lacking:
            assert done.code == 0, done.err
            continue
        assert done.code == 2
        assert words in " ".join(done.err.split())
        assert not (tmp_path / "run" / f"export-{format}").exists()
