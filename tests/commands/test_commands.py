"""Every command does its work, ends with 0 and names the file to look at next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom import Recipe, __version__
from fedloom.cli.app import show_checks
from fedloom.recipe.library import builtin_recipes
from fedloom.runtimes.doctor import Check
from tests.helpers.scored import SCORED, SUITE


@pytest.fixture
def scored(cli, recipe_file, tmp_path):
    """(folder, summary) of a finished run with scores."""
    done = cli("run", recipe_file(SCORED), "--out", "run", setup=SUITE)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["score"]["before"] < 1
    return tmp_path / "run", summary


def test_run_shows_its_way_and_names_the_report(cli, recipe_file):
    done = cli("run", recipe_file(), "--out", "run")
    assert done.code == 0
    assert done.out.splitlines()[-1].split() == ["report", "run/report.html"]
    assert "adapter  run/adapter" in done.out
    for words in ("round 1/2", "round 2/2", "before training", "after round 2", "held-out loss", "3 clients"):
        assert words in done.err
    quiet = cli("run", recipe_file(), "--out", "quiet", "--quiet")
    assert quiet.err == ""
    assert "report   quiet/report.html" in quiet.out


def test_a_run_without_out_goes_to_runs_by_its_name(cli, recipe_file, tmp_path):
    assert cli("run", recipe_file(), "name=mine").code == 0
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


@pytest.mark.parametrize("packing", ["on", "off"])
def test_evaluate_finds_what_the_run_found(cli, scored, tmp_path, packing):
    _, summary = scored
    done = cli("evaluate", "run", "--set", f"train.packing={packing}", "--out", "after.json", setup=SUITE)
    assert done.code == 0, done.err
    assert "after.json" in done.out
    after = json.loads((tmp_path / "after.json").read_text())
    assert after["loss"] == pytest.approx(summary["loss"]["after"], rel=1e-6)
    assert after["score"] == summary["score"]["after"]
    assert after["questions"] == summary["score"]["questions"]
    for client, values in after["clients"].items():
        assert values["loss"] == pytest.approx(summary["per_client"][client]["loss"]["after"], rel=1e-6)
        assert values["score"] == summary["per_client"][client]["score"]["after"]


def test_evaluate_of_the_plain_model_finds_what_there_was_before(cli, scored, tmp_path, tiny_model):
    _, summary = scored
    recipe = tmp_path / "tiny.yaml"
    done = cli("evaluate", tiny_model, "--recipe", recipe, "--out", "before.json", setup=SUITE)
    assert done.code == 0, done.err
    before = json.loads((tmp_path / "before.json").read_text())
    assert before["loss"] == pytest.approx(summary["loss"]["before"], rel=1e-6)
    assert before["score"] == summary["score"]["before"]


def test_evaluate_of_an_adapter_folder_and_of_a_merged_model(cli, scored, tmp_path):
    _, summary = scored
    assert cli("export", "run", "--format", "merged", "--out", "merged").code == 0
    for target in ("run/adapter", "merged"):
        done = cli("evaluate", target, "--recipe", tmp_path / "tiny.yaml", "--out", "numbers.json", setup=SUITE)
        assert done.code == 0, done.err
        numbers = json.loads((tmp_path / "numbers.json").read_text())
        assert numbers["loss"] == pytest.approx(summary["loss"]["after"], rel=1e-5)


def test_evaluate_takes_the_base_that_an_adapter_names_and_the_settings_that_a_model_is_given(cli, scored, tmp_path):
    """No recipe says which model it is; the command line may."""
    _, summary = scored
    done = cli("evaluate", "run/adapter", "--recipe", "tiny.yaml", "--set", "model.name=./nowhere", setup=SUITE)
    assert done.code == 2 and "nowhere" in done.err
    recipe = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**recipe, "model": "./nowhere"}))
    done = cli("evaluate", "run/adapter", "--recipe", "other.yaml", "--out", "numbers.json", setup=SUITE)
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["loss"] == pytest.approx(summary["loss"]["after"], rel=1e-5)
    losses = []
    assert cli("export", "run", "--format", "merged", "--out", "plain").code == 0
    for more in ([], ["--set", "model.dtype=bfloat16"]):
        done = cli("evaluate", "plain", "--recipe", "other.yaml", *more, "--out", "numbers.json", setup=SUITE)
        assert done.code == 0, done.err
        losses.append(json.loads((tmp_path / "numbers.json").read_text())["loss"])
    assert losses[0] == pytest.approx(summary["loss"]["after"], rel=1e-5)
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_evaluate_with_another_suite_and_limit(cli, scored, tmp_path):
    longer = SUITE.replace('"right-length"', '"always"').replace("len(answer) % 3 == len(example.output) % 3", "True")
    args = ["--suite", "always", "--set", "evaluation.limit=2", "--out", "numbers.json"]
    done = cli("evaluate", "run", *args, setup=longer)
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["suite"], numbers["score"], numbers["questions"]) == ("always", 1.0, 6)


def logits(model, tokenizer):
    ids = tokenizer("copy: cow dog", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_exports_are_the_same_model(cli, scored, tmp_path, tiny_model):
    for format in ("peft", "merged"):
        done = cli("export", "run", "--format", format)
        assert done.code == 0, done.err
        assert done.out.split() == [format, f"run/export-{format}"]
    saved, exported = (tmp_path / "run" / n for n in ("adapter", "export-peft"))
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == {p.name: p.read_bytes() for p in exported.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "export-merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export-merged")
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not [n for n in load_file(tmp_path / "run" / "export-merged" / "model.safetensors") if "lora" in n]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = logits(base, tokenizer)
    adapted = logits(PeftModel.from_pretrained(base, exported), tokenizer)
    assert float((logits(merged, tokenizer) - adapted).abs().max()) < 1e-4
    assert float((plain - adapted).abs().max()) > 1e-2


def test_report_of_one_run_and_of_several(cli, scored, tmp_path):
    page = tmp_path / "run" / "report.html"
    before = page.read_text()
    page.unlink()
    done = cli("report", "run")
    assert done.code == 0
    assert done.out.split() == ["report", "run/report.html"]
    assert len(page.read_text()) == len(before)
    assert cli("run", tmp_path / "tiny.yaml", "algorithm=local", "name=alone", "--out", "alone", setup=SUITE).code == 0
    done = cli("report", "run", "alone", "--out", "both.html")
    assert done.out.split() == ["report", "both.html"]
    assert "alone" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize("name", ["split.svg", "split.html", "split.png"])
def test_split_prints_the_table_and_draws_it(cli, recipe_file, tmp_path, name):
    if name.endswith("png"):
        pytest.importorskip("matplotlib")
    done = cli(
        "split", recipe_file(), "split.splitter=dirichlet", "split.alpha=0.5", "split.num_clients=4", "--out", name
    )
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].split() == ["picture", name]
    assert (tmp_path / name).stat().st_size > 500
    rows = [line.split() for line in done.out.splitlines() if line.startswith("client-")]
    assert [row[0] for row in rows] == ["client-1", "client-2", "client-3", "client-4"]
    assert sum(int(n) for row in rows for n in row[1:4]) == 60
    assert not (tmp_path / "runs").exists()


def test_recipes_lists_all_and_recipe_prints_one_that_runs(cli, tmp_path, tiny_model, recipe_file):
    done = cli("recipes")
    assert done.code == 0
    for name in builtin_recipes():
        assert name in done.out
    done = cli("recipe", "quickstart", "train.lr=0.5", "model=gpt2")
    assert done.code == 0
    (tmp_path / "changed.yaml").write_text(done.out)
    changed = Recipe.load(tmp_path / "changed.yaml")
    assert changed == Recipe.load("quickstart", {"train.lr": 0.5, "model": "gpt2"})
    done = cli("recipe", recipe_file())
    (tmp_path / "again.yaml").write_text(done.out)
    assert cli("run", "again.yaml", "-q").code == 0


def test_fetch_lists_and_clears(cli, tmp_path):
    home = tmp_path / "home"
    (home / "tokenised").mkdir(parents=True)
    (home / "models").mkdir()
    environment = {"FEDLOOM_HOME": str(home)}
    done = cli("fetch", env=environment)
    assert done.code == 0
    for name in ("smollm2-135m", "fed-medmcqa", "fed-dolly"):
        assert name in done.out
    assert str(home) in cli("fetch", "--clear", "tokenised", env=environment).out
    assert not (home / "tokenised").exists()
    assert (home / "models").exists()
    assert cli("fetch", "--clear", "all", env=environment).code == 0
    assert not (home / "models").exists()


def test_fetch_of_the_built_in_model_says_where_it_lies(cli, smollm2, fedloom_home):
    done = cli("fetch", "smollm2-135m")
    assert done.code == 0, done.err
    assert str(fedloom_home / "models" / "smollm2-135m") in done.out


def test_a_mend_is_shown_with_its_brackets(capsys):
    show_checks([Check("note", "extra x", "not installed", 'pip install "fedloom[skills]"')])
    assert "fedloom[skills]" in "".join(capsys.readouterr().out.split("\n"))


def test_doctor_finds_this_machine_fit_and_an_unfit_one_not(cli, tmp_path):
    done = cli("doctor")
    assert done.code == 0, done.out
    for word in ("torch", "cores", "cache", "repeatable to the bit"):
        assert word in done.out
    assert "bad" not in done.out.split()
    done = cli("doctor", env={"FEDLOOM_DATA": str(tmp_path / "nowhere")})
    assert done.code == 1
    assert "1 check failed" in done.sentence
    assert "there is no such folder" in done.out


def test_version_and_help(cli):
    assert cli("--version").out.strip() == f"fedloom {__version__}"
    done = cli("--help")
    assert done.code == 0
    for name in ("run", "recipes", "split", "evaluate", "report", "export", "fetch", "doctor"):
        assert f" {name} " in done.out


def test_help_needs_no_torch(tmp_path):
    import subprocess
    import sys

    check = "import sys, fedloom.cli.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, cwd=Path(tmp_path)).returncode == 0
