"""A user's mistakes: exit code 2, one sentence with the value and the fix, and nothing lost or left behind."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from tests.helpers import tiny

# Overrides of the tiny recipe → words that the sentence must have. Sixty rows in three categories.
MISTAKES = {
    "unknown key": (["train.lrr=0.1"], ["train.lrr", "did you mean train.lr?"]),
    "unknown section": (["trian.lr=0.1"], ["trian", "did you mean train?"]),
    "key of another section": (["federation.steps=3"], ["federation.steps"]),
    "no number": (["train.lr=fast"], ["train.lr", "fast"]),
    "out of range": (["train.batch_size=0"], ["train.batch_size", "0"]),
    "not finite": (["train.lr=.inf"], ["train.lr"]),
    "override without =": (["train.lr"], ["train.lr", "key=value"]),
    "override that is no YAML": (["train.lr=[1"], ["train.lr=[1", "YAML"]),
    "override below a value": (["seed.deep=1"], ["seed", "42"]),
    "unknown corpus": (["data.corpus=fed-skils", "data.path=null"], ["fed-skils", "did you mean fed-skills?"]),
    "no corpus": (["data.path=null"], ["data.corpus"]),
    "unknown model": (["model=smolm2-135m"], ["smolm2-135m", "did you mean smollm2-135m"]),
    "no model folder": (["model=./nowhere"], ["./nowhere", "folder"]),
    "no data file": (["data.path=nowhere.jsonl"], ["nowhere.jsonl", "does not exist"]),
    "missing column": (["data.columns.output=reply"], ["reply", "instruction, input, output, category"]),
    "missing column to split by": (["split.by=language"], ["language", "split.by"]),
    "empty client": (["split.min_size=9"], ["copy", "8", "split.min_size=9"]),
    "alpha zero": (["split.splitter=dirichlet", "split.alpha=0"], ["split.alpha", "0"]),
    "alpha negative": (["split.splitter=dirichlet", "split.alpha=-1"], ["split.alpha", "-1"]),
    "dirichlet without alpha": (["split.splitter=dirichlet"], ["split.alpha=0.5"]),
    "more clients than examples": (["split.splitter=uniform", "split.num_clients=61"], ["61", "60"]),
    "more clients than values": (["split.num_clients=4"], ["split.num_clients=4", "3"]),
    "nothing to train on": (["split.test=0.6", "split.validation=0.5"], ["split.validation", "1.1"]),
    "too many clients a round": (["federation.clients_per_round=4"], ["clients_per_round=4", "3"]),
    "no whole number of clients": (["federation.clients_per_round=1.5"], ["1.5"]),
    "quorum out of reach": (["federation.min_clients=4"], ["min_clients=4", "3"]),
    "buffer out of reach": (
        ["algorithm={name: fedbuff, buffer: 4}"],
        ["algorithm.buffer=4", "only 3", "clients_per_round"],
    ),
    "no whole buffer": (["algorithm={name: fedbuff, buffer: 1.5}"], ["algorithm.buffer=1.5", "neither a whole number"]),
    "quorum over the buffer": (
        ["algorithm={name: fedbuff, buffer: 2}", "federation.min_clients=3"],
        ["min_clients=3", "2 updates"],
    ),
    "steps and epochs": (["train={steps: 2, epochs: 1}"], ["train.steps=2", "train.epochs=1"]),
    "unknown algorithm": (["algorithm=fedagv"], ["fedagv", "did you mean fedavg?"]),
    "unknown option": (["algorithm.weigth_by=tokens"], ["algorithm.weigth_by", "did you mean algorithm.weight_by?"]),
    "option out of range": (["algorithm.weight_by=size"], ["algorithm.weight_by", "size"]),
    "option of none": (["algorithm={name: local, mu: 1}"], ["algorithm.mu", "local"]),
    "unknown splitter": (["split.splitter=dirichelt"], ["dirichelt", "did you mean dirichlet?"]),
    "unknown suite": (["evaluation.suite=skils"], ["skils", "did you mean skills?"]),
    "suite that does not fit": (["evaluation.suite=gsm"], ["gsm", "evaluation.suite"]),
    "choices that are not there": (["evaluation.suite=multiple-choice"], ["multiple-choice", "evaluation.suite"]),
    "unknown tracker": (["tracking.trackers=[tensorbord]"], ["tensorbord", "did you mean tensorboard?"]),
    "tracker that is not installed": (["tracking.trackers=[swanlab]"], ["swanlab", "pip install"]),
    "unknown runtime": (["runtime.name=simulater"], ["simulater", "did you mean simulator?"]),
    "unknown device": (["runtime.device=tpu9000"], ["tpu9000", "cpu"]),
    "no such GPU": (["runtime.device=cuda:7"], ["cuda:7"]),
    "unknown method": (["adapter.method=prompt_tunning"], ["prompt_tunning", "did you mean prompt_tuning?"]),
    "key of another method": (["adapter.virtual_tokens=4"], ["adapter.virtual_tokens", "prompt_tuning", "lora"]),
    "no room for virtual tokens": (
        ["adapter.method=prompt_tuning", "data.max_length=500"],
        ["data.max_length=500", "512", "data.max_length=492"],
    ),
    "16-bit weights that train": (["adapter.method=full", "model.dtype=bfloat16"], ["method=full", "float32"]),
    "unknown modules": (["adapter.target_modules=[nowhere]"], ["nowhere", "adapter.target_modules"]),
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(cli, recipe_file, tmp_path, mistake):
    overrides, words = MISTAKES[mistake]
    recipe = recipe_file()
    done = cli("run", recipe, *overrides, "--out", "deep/run", env={"HF_HUB_OFFLINE": "1"})
    assert done.code == 2, done.err
    for word in words:
        assert word in done.sentence
    assert done.out == ""
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "mistake", ["unknown key", "missing column", "unknown tracker", "suite that does not fit", "unknown modules"]
)
def test_a_refused_recipe_leaves_the_run_that_it_was_to_replace(cli, recipe_file, tmp_path, mistake):
    recipe = recipe_file()
    assert cli("run", recipe, "--out", "run").code == 0
    before = files(tmp_path / "run")
    done = cli("run", recipe, *MISTAKES[mistake][0], "--out", "run", "--overwrite")
    assert done.code == 2, done.err
    assert files(tmp_path / "run") == before


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_that_are_all_empty(cli, recipe_file, tmp_path):
    data = write(tmp_path / "mute.jsonl", [{**row, "output": " "} for row in tiny.rows(12)])
    done = cli("run", recipe_file(), f"data.path={data}", "--out", "run")
    assert done.code == 2
    assert "all 12 rows" in done.sentence
    assert "empty answer" in done.sentence
    assert "'output'" in done.sentence


def test_a_file_without_rows(cli, recipe_file, tmp_path):
    done = cli("run", recipe_file(), f"data.path={write(tmp_path / 'none.jsonl', [])}", "--out", "run")
    assert done.code == 2
    assert "no rows" in done.sentence


def test_a_client_that_ends_with_nothing_to_train_on(cli, recipe_file, tmp_path):
    rows = [*tiny.rows(30), {"instruction": "a", "input": "", "output": "b", "category": "lonely"}]
    data = write(tmp_path / "lonely.jsonl", rows)
    done = cli("run", recipe_file(), f"data.path={data}", "split.min_size=2", "--out", "run")
    assert done.code == 2
    assert "lonely" in done.sentence
    assert "split.min_size" in done.sentence


def test_a_run_folder_in_use(cli, recipe_file, tmp_path):
    recipe = recipe_file()
    assert cli("run", recipe, "--out", "run").code == 0
    before = files(tmp_path / "run")
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for how in ("--resume", "--overwrite", "--quiet"):
            done = cli("run", recipe, "--out", "run", how)
            assert done.code == 2
            assert "in use by another process" in done.sentence
    assert files(tmp_path / "run") == before
    assert cli("run", recipe, "--out", "run", "--overwrite").code == 0


def test_two_runs_at_once_in_one_folder(cli, recipe_file, tmp_path):
    """The second is refused while the first trains, and the first does not notice."""
    recipe = recipe_file()
    setup = f"""
import subprocess, sys
from fedloom.federation.record.events import Events
write = Events.write
def slow(self, event, **fields):
    write(self, event, **fields)
    if event == "round_finished" and fields["round"] == 1:
        command = [sys.executable, "-m", "fedloom", "run", {str(recipe)!r}, "--out", "run", "--overwrite"]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.returncode, done.stderr.splitlines()[-1])
Events.write = slow
"""
    done = cli("run", recipe, "--out", "run", setup=setup)
    assert done.code == 0, done.err
    assert done.out.startswith("2 fedloom: run folder run is in use by another process")


def test_a_run_folder_that_holds_a_run(cli, recipe_file, tmp_path):
    recipe = recipe_file()
    assert cli("run", recipe, "--out", "run").code == 0
    before = files(tmp_path / "run")
    done = cli("run", recipe, "--out", "run")
    assert done.code == 2
    for word in ("already holds a run", "--resume", "--overwrite", "--out"):
        assert word in done.sentence
    assert files(tmp_path / "run") == before
    assert cli("run", recipe, "--out", "run", "--overwrite", "seed=1").code == 0
    assert files(tmp_path / "run")["summary.json"] != before["summary.json"]


@pytest.mark.parametrize("how", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_with_something_else_in_it(cli, recipe_file, tmp_path, how):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    done = cli("run", recipe_file(), "--out", "thesis", *how)
    assert done.code == 2
    assert "thesis" in done.sentence
    assert files(tmp_path / "thesis") == {"chapter.tex": b"years of work"}


def test_overwriting_spares_what_is_not_the_runs_own(cli, recipe_file, tmp_path):
    recipe = recipe_file()
    assert cli("run", recipe, "--out", "run").code == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert cli("run", recipe, "--out", "run", "--overwrite").code == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_file_in_place_of_a_folder(cli, recipe_file, tmp_path):
    (tmp_path / "file").write_text("x")
    done = cli("run", recipe_file(), "--out", "file")
    assert done.code == 2
    assert "file" in done.sentence


def test_nothing_to_resume(cli, recipe_file, tmp_path):
    done = cli("run", recipe_file(), "--out", "run", "--resume")
    assert done.code == 2
    assert "no run to resume in run" in done.sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["report", "nowhere"], ["report", "empty"], ["export", "nowhere"], ["export", "empty"],
        ["evaluate", "./nowhere"], ["evaluate", "./empty"], ["export", "unfinished"],
        ["evaluate", "unfinished"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_folder_that_is_no_finished_run(cli, recipe_file, tmp_path, args):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text(recipe_file().read_text())
    done = cli(*args, env={"HF_HUB_OFFLINE": "1"})
    assert done.code == 2, done.err
    assert args[1].removeprefix("./") in done.sentence


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "quickstrat"], ["quickstrat", "did you mean quickstart?"]),
        (["run", "no/such.yaml"], ["no/such.yaml", "fedloom recipes"]),
        (["recipe", "quickstrat"], ["quickstrat"]),
        (["split", "quickstrat"], ["quickstrat"]),
        (["fetch", "smolm2-135m"], ["smolm2-135m", "did you mean smollm2-135m?"]),
        (["fetch", "--clear", "model"], ["model", "did you mean models?"]),
    ],
    ids=" ".join,
)
def test_names_that_are_wrong(cli, args, words):
    done = cli(*args)
    assert done.code == 2
    for word in words:
        assert word in done.sentence


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "train: {lr: [}\n", "\xff\xfe", ""], ids=["list", "broken", "binary", "empty"]
)
def test_a_file_that_is_no_recipe(cli, tmp_path, text):
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    done = cli("run", "bad.yaml")
    assert done.code == 2
    assert "bad.yaml" in done.sentence


def test_a_picture_of_an_unknown_kind(cli, recipe_file):
    done = cli("split", recipe_file(), "--out", "split.docx")
    assert done.code == 2
    assert "split.docx" in done.sentence or "docx" in done.sentence


def test_export_refuses_what_is_there(cli, recipe_file, tmp_path):
    assert cli("run", recipe_file(), "--out", "run").code == 0
    assert cli("export", "run", "--out", "here").code == 0
    before = files(tmp_path / "here")
    for args, word in (
        (["export", "run", "--out", "here"], "--out"),
        (["export", "run", "--format", "ggfu"], "ggfu"),
        (["export", "run", "--client", "copy"], "--client"),
    ):
        done = cli(*args)
        assert done.code == 2
        assert word in done.sentence
    assert files(tmp_path / "here") == before


def test_a_personal_result_is_named(cli, recipe_file, tmp_path):
    assert cli("run", recipe_file(), "algorithm=local", "--out", "run").code == 0
    for args, words in (
        (["export", "run"], ["--client", "copy, last, upper"]),
        (["evaluate", "run"], ["--client"]),
        (["export", "run", "--client", "coyp"], ["did you mean copy?"]),
    ):
        done = cli(*args)
        assert done.code == 2
        for word in words:
            assert word in done.sentence
    assert cli("export", "run", "--client", "copy").code == 0
    assert cli("evaluate", "run", "--client", "last").code == 0
