"""`fedloom compare`: the numbers are the runs' own, ranks hold among what may be compared, and what is no run is named."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import fedloom
from fedloom.cli.app import app
from fedloom.common.errors import UserError
from fedloom.experiment.benchmark.columns import NAMED, measured
from fedloom.experiment.benchmark.compare import Leaderboard, leaderboard
from fedloom.federation.record.client_table import ClientTable
from fedloom.recipe.overrides import set_dotted
from fedloom.reporting import differences as settings

Edit = Callable[..., Path]


@pytest.fixture(scope="module")
def real(tiny_model, tiny_data, tmp_path_factory):
    """Two finished runs that differ in their algorithm alone."""
    folder = tmp_path_factory.mktemp("runs")
    for name, algorithm in (("together", "fedavg"), ("alone", "local")):
        recipe = fedloom.Recipe.parse(
            {
                "name": name,
                "model": str(tiny_model),
                "data": {"path": str(tiny_data), "max_length": 96, "template": "plain"},
                "split": {"splitter": "meta", "test": 0.2},
                "adapter": {"rank": 2, "alpha": 4},
                "algorithm": algorithm,
                "train": {"steps": 2, "batch_size": 2, "lr": 1e-2},
                "federation": {"rounds": 2},
                "runtime": {"threads": 1, "device": "cpu"},
                "evaluation": {"suite": None, "answers": 0},
            }
        )
        fedloom.run(recipe, out=folder / name)
    return folder


@pytest.fixture
def made(real, tmp_path) -> Edit:
    """A function: a copy of a run in which some numbers of the summary, or keys of the recipe, are others."""

    def edit(name: str, summary: dict[str, Any] | None = None, **keys: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(real / "together", folder)
        held = json.loads((folder / "summary.json").read_text())
        for dotted, value in (summary or {}).items():
            set_dotted(held, dotted, value)
        (folder / "summary.json").write_text(json.dumps(held))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        for dotted, value in keys.items():
            set_dotted(recipe, dotted.replace("__", "."), value)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return folder

    return edit


def ranks(board: Leaderboard) -> list[tuple[str, str]]:
    return [(row.place["rank"], row.name) for row in board.rows]


def test_numbers_are_the_runs_own(real):
    board = leaderboard([real / "together", real / "alone"])
    summaries = {name: json.loads((real / name / "summary.json").read_text()) for name in ("together", "alone")}
    better = sorted(summaries, key=lambda name: summaries[name]["loss"]["after"])
    assert ranks(board) == [("1", better[0]), ("2", better[1])]
    assert board.differs == {"algorithm.name": ["fedavg" if name == "together" else "local" for name in better]}
    assert (board.sentence, board.ranked_by) == ("", "loss")
    for row in board.rows:
        summary = summaries[row.name]
        own = [client["loss"]["after"] for client in summary["per_client"].values()]
        assert row.means["loss_before"] == summary["loss"]["before"]
        assert row.means["loss_worst_client"] == summary["loss"]["worst_client"]["after"] == max(own)
        assert row.means["loss_own"] == pytest.approx(statistics.fmean(own), abs=1e-12)
        assert row.means["loss_spread"] == pytest.approx(statistics.pstdev(own), abs=1e-12)
        assert row.means["train_tokens"] == summary["cost"]["train_tokens"]
        assert row.means["train_flops"] == summary["cost"]["train_flops"]


def test_scores_rank_where_every_run_has_one(made):
    good = made("good", {"score.after": 0.75, "loss.after": 3.0})
    bad = made("bad", {"score.after": 0.25, "loss.after": 2.0})
    same = made("same", {"score.after": 0.25, "loss.after": 2.5})
    board = leaderboard([bad, good, same])
    assert (board.ranked_by, ranks(board)) == ("score", [("1", "good"), ("2", "bad"), ("2", "same")])
    none = made("none", {"loss.after": 1.0})
    board = leaderboard([bad, good, none])
    assert (board.ranked_by, ranks(board)) == ("loss", [("1", "none"), ("2", "bad"), ("3", "good")])


def test_what_may_not_be_compared_is_said_and_ranked_apart(made):
    paths = [
        made("first", {"loss.after": 2.0}),
        made("other", {"loss.after": 1.0}, seed=43, data__max_length=64, train__lr=0.5),
        made("second", {"loss.after": 1.5}, train__lr=0.1, data__license="mine"),
        made("fourth", {"loss.after": 1.2}, seed=43, data__max_length=64),
        made("lonely", {"loss.after": 0.5}, model__name="elsewhere"),
    ]
    board = leaderboard(paths)
    assert board.sentence.startswith("These runs are not all comparable: data.max_length, model.name and seed differ;")
    assert ranks(board) == [("1", "second"), ("2", "first"), ("1", "other"), ("2", "fourth"), ("–", "lonely")]
    assert set(board.differs) == {"data.license", "data.max_length", "model.name", "seed", "train.lr"}
    assert board.differs["train.lr"] == [0.1, 0.01, 0.5, 0.01, 0.01]
    # how many questions were asked matters to scores alone
    asked = [made("few", {"score.after": 0.5}, evaluation__limit=3), made("many", {"score.after": 0.5})]
    assert "evaluation.limit differs" in leaderboard(asked).sentence
    assert leaderboard([asked[0], paths[0]]).sentence == ""


def test_of_many_runs_each_says_what_is_its_own():
    recipes = [{"a": 2, "b": [1]}, {"a": 1, "b": [1]}, {"a": 1, "b": [1], "c": True}, {"a": 1, "b": [{"x": 1}]}]
    told = settings.find_unusual(settings.find_differences(recipes))
    assert [settings.line(values) for values in told] == ["a=2", "", "c=true", 'b=[{"x": 1}]']


@pytest.mark.parametrize("out", [True, False])
def test_the_command_shows_all_and_writes_it(real, tmp_path, out):
    line = ["compare", str(real / "together"), str(real / "alone")] + (
        ["--out", str(tmp_path / "board")] if out else []
    )
    ran = CliRunner().invoke(app, line)
    assert ran.exit_code == 0, ran.output
    board = leaderboard([real / "together", real / "alone"])
    for row in board.rows:
        for key in ("loss_before", "loss", "loss_spread", "train_flops", "upload_bytes", "peak_memory_bytes"):
            assert row.text(NAMED[key]) in ran.output
    assert "algorithm.name" in ran.output and "train.lr" not in ran.output
    if not out:
        assert not list(tmp_path.iterdir())
        return
    assert ran.output.splitlines()[-1].split() == ["report", str(tmp_path / "board" / "leaderboard.html")]
    held = list(csv.DictReader((tmp_path / "board" / "leaderboard.csv").read_text().splitlines()))
    assert [(row["rank"], row["run"], float(row["loss"])) for row in held] == [
        (row.place["rank"], row.name, row.means["loss"]) for row in board.rows
    ]
    best = board.rows[0].text(NAMED["loss"])
    assert rf"\textbf{{{best}}}" in (tmp_path / "board" / "leaderboard.tex").read_text()
    page = (tmp_path / "board" / "leaderboard.html").read_text()
    assert f"<b>{best}</b>" in page and "<code>algorithm.name</code>" in page
    assert page.count('<svg class="chart') == 6  # against traffic, against compute, over rounds, each for two widths


def test_what_is_no_finished_run_is_named(real, made, tmp_path):
    unfinished = made("unfinished")
    (unfinished / "summary.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "page").write_text("mine")
    cases = [
        ([unfinished, real / "alone"], f"(round 2 of 2): finish it with `fedloom run {unfinished} --resume`"),
        ([tmp_path / "empty", real / "alone"], "empty is not a run folder"),
        ([tmp_path / "nowhere", real / "alone"], "there is no run folder"),
        ([real / "alone"], "there is 1 finished run to compare: name two or more"),
        ([real / "alone", real / "alone"], "is named twice"),
        ([real / "alone", real / "together", "--out", tmp_path / "page"], "page is a file: name a folder with --out"),
    ]
    for arguments, sentence in cases:
        ran = CliRunner().invoke(app, ["compare", *map(str, arguments)])
        assert ran.exit_code == 2
        assert sentence in ran.output and ran.output.count("\n") == 1
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "benchmark.json").write_text("{")
    with pytest.raises(UserError, match=r"benchmark.json cannot be read"):
        leaderboard([tmp_path / "torn", real / "alone"])


def test_of_many_clients_all_count_and_the_first_message_does_not(tmp_path):
    losses = [1.0 + 0.01 * (7 * i % 300) for i in range(300)]
    clients = {f"c{i}": {"loss": loss, "tokens": 5, "score": None, "questions": 0} for i, loss in enumerate(losses)}
    told = ClientTable(tmp_path / "evaluations").told(3, clients)
    assert told["clients"] == {}
    updates = [
        {"event": "client_update", "round": r, "upload_bytes": u, "download_bytes": d, "broadcast_bytes": d * (r == 1)}
        for r, u, d in ((1, 900, 5000), (2, 100, 300), (2, 200, 300), (3, 300, 600))
    ]
    evaluation = {"event": "evaluation", "round": 3, **told}
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in [*updates, evaluation]))
    (tmp_path / "summary.json").write_text(json.dumps({"per_client": {}, "clients": 300}))
    found = measured(tmp_path)
    assert found is not None
    assert NAMED["message_up_bytes"].read(found) == 200
    assert NAMED["message_down_bytes"].read(found) == 400
    assert NAMED["loss_own"].read(found) == pytest.approx(statistics.fmean(losses))
    assert NAMED["loss_spread"].read(found) == pytest.approx(statistics.pstdev(losses))
    assert NAMED["score_spread"].read(found) is None
    (tmp_path / "events.jsonl").write_text(json.dumps(updates[0]) + "\n")
    assert NAMED["message_up_bytes"].read(measured(tmp_path) or {}) == 900
