"""`fedloom benchmark`: the cells are the recipes that they say, the table is the runs', and a kill changes nothing."""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedloom
from fedloom.common import registry
from fedloom.common.environment import peak_memory_bytes, reset_peak_memory
from fedloom.common.errors import RunFailed, UserError
from fedloom.common.logs import heard_by
from fedloom.experiment.benchmark import runner
from fedloom.experiment.benchmark.columns import COLUMNS, MEASURED
from fedloom.experiment.benchmark.compare import leaderboard
from fedloom.experiment.benchmark.declaration import Benchmark, builtin_benchmarks
from fedloom.experiment.benchmark.page import write_benchmark
from fedloom.experiment.benchmark.ratios import lines, ratios
from fedloom.experiment.benchmark.runner import run_benchmark
from fedloom.experiment.benchmark.table import Row, alike, best, bests, rows, to_csv, to_latex
from fedloom.federation.checks import check_algorithm
from fedloom.federation.record.events import Events
from fedloom.recipe.adapter import METHODS
from fedloom.reporting.scatter import Point, Scatter, draw

pytestmark = pytest.mark.usefixtures("loading_once")


@pytest.fixture
def declared(tiny_model, tiny_data, tmp_path):
    """A function of what is different: the file of a benchmark of 2 × 3 cells."""

    def make(**more: Any) -> str:
        values: dict[str, Any] = {
            "description": "a small one & its 100 % table",
            "base": {
                "model": str(tiny_model),
                "data": {"path": str(tiny_data), "max_length": 96, "template": "plain"},
                "adapter": {"rank": 2, "alpha": 4},
                "train": {"steps": 2, "batch_size": 2, "lr": 1e-2},
                "federation": {"rounds": 2},
                "runtime": {"threads": 1, "device": "cpu"},
                "evaluation": {"suite": None, "answers": 0},
            },
            "axes": {
                "split": {
                    "own": {"split": {"splitter": "meta", "test": 0.2, "validation": 0.1}},
                    "even": {"split": {"splitter": "uniform", "num_clients": 2, "test": 0.2, "validation": 0.1}},
                },
                "row": {
                    "global": {"algorithm": "global"},
                    "federated": {"algorithm": "fedavg"},
                    "local": {"algorithm": "local"},
                },
            },
            "seeds": [1, 2],
            "sizes": {"small": {}, "long": {"base": {"federation.rounds": 3}, "seeds": [7]}},
            **more,
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return str(path)

    return make


def measured(text: str) -> list[Mapping[str, str]]:
    """The columns of a CSV that follow from the recipes."""
    keys = {key for c in MEASURED for key in (c.key, f"{c.key}_std")} | {"split", "row", "seeds", "chosen", "trouble"}
    return [{k: v for k, v in row.items() if k in keys} for row in csv.DictReader(text.splitlines())]


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in builtin_benchmarks() for size in Benchmark.load(name).sizes]
)
def test_every_size_of_a_built_in_benchmark_is_whole(name, size):
    benchmark = Benchmark.load(name, size)
    assert {"smoke", "laptop"} <= set(benchmark.sizes)
    cells = benchmark.cells()
    recipes = [cell.recipe(seed, choice) for cell in cells for choice in cell.choices() for seed in benchmark.seeds]
    assert len({cell.name for cell in cells}) == len(cells) <= len(recipes)
    for recipe in recipes:
        check_algorithm(recipe)


def test_built_in_benchmarks_have_the_rows_that_they_are_named_for():
    assert len(Benchmark.load("paper", "laptop").cells()) == 18
    assert [c.place["algorithm"] for c in Benchmark.load("zoo").cells()] == [
        n for n in registry.algorithms.names() if n not in Benchmark.load("zoo").leave_out
    ]
    assert {c.recipe(1).adapter.method for c in Benchmark.load("efficiency").cells()} == set(METHODS)
    own = [n for n in registry.algorithms.names() if registry.algorithms.get(n).properties.personal]
    assert [c.place["algorithm"] for c in Benchmark.load("personalised").cells()] == [
        "fedavg", "local", *(n for n in own if n != "local")
    ]  # fmt: skip
    drops = [c.recipe(1).algorithm.options.get("drop") for c in Benchmark.load("fedot").cells()]
    assert drops == [None, 0.0, 0.2, 0.5, 0.2]


def test_a_cell_is_the_recipe_with_its_points(declared):
    cells = Benchmark.load(declared(), "long").cells()
    assert [c.name for c in cells] == [f"{s}/{r}" for s in ("own", "even") for r in ("global", "federated", "local")]
    recipe = cells[4].recipe(7)
    assert (recipe.algorithm.name, recipe.split.splitter, recipe.federation.rounds, recipe.seed) == (
        "fedavg",
        "uniform",
        3,
        7,
    )


def test_the_table_has_what_the_runs_have(declared, tmp_path):
    stated = {"local_over_federated": {"column": "loss", "over": ["local", "federated"]}}
    benchmark = Benchmark.load(declared(ratios=stated), "small")
    found = rows(run_benchmark(benchmark, tmp_path / "out"))
    assert not any(row.trouble for row in found)
    for row, cell in zip(found, benchmark.cells(), strict=True):
        alone = [fedloom.run(cell.recipe(s), out=tmp_path / "alone" / row.name / str(s)).summary for s in (1, 2)]
        losses = [summary["loss"]["after"] for summary in alone]
        assert row.means["loss"] == pytest.approx(statistics.fmean(losses), abs=1e-12)
        assert row.spreads["loss"] == pytest.approx(statistics.stdev(losses), abs=1e-12)
        sent = [s["cost"]["upload_bytes"] - s["cost"]["evaluation_upload_bytes"] for s in alone]
        assert row.means["upload_bytes"] == pytest.approx(statistics.fmean(sent), rel=1e-2)
        own = [statistics.fmean(c["loss"]["after"] for c in s["per_client"].values()) for s in alone]
        assert row.means["loss_own"] == pytest.approx(statistics.fmean(own), abs=1e-12)
    by_name = {row.name: row for row in found}
    assert by_name["own/global"].means["upload_bytes"] < by_name["own/federated"].means["upload_bytes"]
    assert ratios(benchmark, found) == {
        f"local_over_federated.{split}": by_name[f"{split}/local"].means["loss"]
        / by_name[f"{split}/federated"].means["loss"]
        for split in ("own", "even")
    }
    board = leaderboard([tmp_path / "out"])
    assert {row.name: (row.means, row.spreads, row.seeds) for row in board.rows} == {
        row.name: (row.means, row.spreads, row.seeds) for row in found
    }
    assert [row.place["rank"] for row in board.rows] == ["1", "2", "3"] * 2  # each split by itself
    assert "comparable: split.num_clients and split.splitter differ" in board.sentence


def test_a_kill_at_any_event_gives_the_same_table(declared, tmp_path, monkeypatch):
    axes = yaml.safe_load(Path(declared()).read_text())["axes"]
    axes["row"]["local"]["pilot_of"] = "federated"
    del axes["split"]["even"]
    pilot = {"train.lr": [1e-3, 1e-2]}
    benchmark = Benchmark.load(
        declared(axes=axes, pilot=pilot, pilot_values={"federation.rounds": 1}, seeds=[3]), "small"
    )
    whole = to_csv(rows(run_benchmark(benchmark, tmp_path / "whole")))
    write, left = Events.write, [0]

    def dying(self: Events, event: str, **fields: Any) -> None:
        write(self, event, **fields)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Events, "write", dying)
    kills = 0
    for after in (3, 17, 23, 5, 31):
        left[0] = after
        try:
            run_benchmark(benchmark, tmp_path / "killed")
        except KeyboardInterrupt:
            kills += 1
    left[0] = -1
    resumed = to_csv(rows(run_benchmark(benchmark, tmp_path / "killed")))
    assert kills == 5
    assert measured(resumed) == measured(whole)
    for one, other in zip(csv.DictReader(resumed.splitlines()), csv.DictReader(whole.splitlines()), strict=True):
        for key in ("message_up_bytes", "message_down_bytes", "upload_bytes"):
            assert float(one[key]) == pytest.approx(float(other[key]), abs=100)  # a message says how long its work took
    chosen = {(row["split"], row["row"]): row["chosen"] for row in csv.DictReader(whole.splitlines())}
    assert chosen["own", "local"] == chosen["own", "federated"] != ""
    assert sorted(p.name for p in (tmp_path / "whole" / "pilots" / "own").iterdir()) == ["federated", "global"]


def test_what_is_finished_is_not_run_again(declared, tmp_path, monkeypatch):
    benchmark = Benchmark.load(declared(seeds=[1]), "small")
    run_benchmark(benchmark, tmp_path / "out", only="federated")
    ran = []
    monkeypatch.setattr(
        runner, "run", lambda recipe, folder, **how: ran.append(recipe.name) or fedloom.run(recipe, folder, **how)
    )
    found = rows(run_benchmark(benchmark, tmp_path / "out", only="own"))
    assert sorted(ran) == ["own-global", "own-local"]
    assert [row.trouble for row in found] == ["", "", "", "not run yet", "", "not run yet"]
    with pytest.raises(UserError, match="--only nothing: no cell has this in its name"):
        run_benchmark(benchmark, tmp_path / "out", only="nothing")


def test_the_pilot_takes_what_validation_says(declared, tmp_path):
    benchmark = Benchmark.load(
        declared(pilot={"train.lr": [1e-6, 1e-2, 1e30]}, pilot_values={"train.steps": 3}, seeds=[1]), "small"
    )
    out = tmp_path / "out"
    found = rows(run_benchmark(benchmark, out, only="own/federated"))[1]
    assert found.chosen == {"train.lr": 1e-2}
    losses = []
    for number, rate in enumerate((1e-6, 1e-2)):
        events = [
            json.loads(line)
            for line in (out / "pilots/own/federated" / str(number) / "events.jsonl").read_text().splitlines()
        ]
        losses.append(
            next(e["metrics"]["validation_loss/loss"] for e in reversed(events) if e["event"] == "round_finished")
        )
        stored = yaml.safe_load((out / "pilots/own/federated" / str(number) / "recipe.yaml").read_text())
        assert (stored["train"]["lr"], stored["train"]["steps"]) == (rate, 3)
    assert losses[1] < losses[0]
    stored = yaml.safe_load((out / "cells/own/federated/1/recipe.yaml").read_text())
    assert (stored["train"]["lr"], stored["train"]["steps"]) == (1e-2, 2)


def test_a_cell_that_fails_is_a_row(declared, tmp_path):
    values = yaml.safe_load(Path(declared(seeds=[1])).read_text())
    values["axes"]["row"]["federated"] = {"algorithm": "fedavg", "federation.min_clients": 9}
    benchmark = Benchmark.load(declared(axes=values["axes"], seeds=[1]), "small")
    found = rows(run_benchmark(benchmark, tmp_path / "out", only="own"))
    assert "federation.min_clients=9" in found[1].trouble
    assert found[1].means["loss"] is None
    assert [row.trouble for row in (found[0], found[2])] == ["", ""]


@pytest.mark.parametrize(
    ("more", "size", "sentence"),
    [
        ({}, "huge", "unknown size 'huge' of mine"),
        ({"sizes": {}}, "small", "the benchmark mine has no sizes"),
        ({"axes": {"a": {"all": "models"}}}, None, "the only words that it may have are algorithms"),
        ({"axes": {"a": {"b": {"train.stepz": 3}}}}, None, "mine, b: .*stepz"),
        ({"axes": {"a": {"b": {"pilot_of": "bb"}}}}, None, "benchmark mine: axes.a.b.pilot_of=bb: no such point"),
        (
            {"axes": {"a": {"b": {"pilot_of": "c"}, "c": {"pilot_of": "d"}, "d": {}}}},
            None,
            "pilot_of names a point that",
        ),
        ({"axes": {"a": {"b": "fedavg"}}}, None, "axes.a.b is 'fedavg': a point is a mapping"),
        ({"axes": {"a": {"b": {"pilot": {"train.lr": 1e-3}}}}}, None, "axes.a.b.pilot is .* a list of values"),
        ({"pilot": {"train.lr": []}}, None, "pilot.train.lr: list should have at least 1 item"),
        ({"pilot": {"train.lr": [1, 2]}, "pilot_values": {"rounds": 1}}, None, "mine, own/global: .*rounds"),
        ({"sead": [1]}, None, "sead"),
        ({"seeds": []}, None, "seeds"),
        ({"terminal": ["losses"]}, None, "unknown column 'losses': did you mean loss"),
        (
            {"ratios": {"r": {"column": "loss", "over": ["own", "local"]}}},
            None,
            "ratios.r: no axis has both own and local",
        ),
    ],
)
def test_mistakes_are_named_before_anything_runs(declared, tmp_path, more, size, sentence):
    with pytest.raises(UserError, match=sentence):
        run_benchmark(Benchmark.load(declared(**more), size), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "sentence"), [("axes: [", "is not YAML"), ("- axes", "holds list, not a mapping"), ("\x00", "is not YAML")]
)
def test_a_file_that_is_no_benchmark_is_named(tmp_path, text, sentence):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"mine\.yaml {sentence}"):
        Benchmark.load(str(tmp_path / "mine.yaml"))


def test_a_section_that_a_size_replaces_does_not_hide_what_the_pilot_tries(declared):
    base = {**yaml.safe_load(Path(declared()).read_text())["base"], "train.lr": 1e-3}
    sizes = {"small": {"base": {"train": {"steps": 3}}}}
    cell = Benchmark.load(declared(base=base, sizes=sizes, pilot={"train.lr": [1e-4, 3e-3]})).cells()[0]
    tried = [cell.recipe(1, choice).train for choice in cell.choices()]
    assert [(train.lr, train.steps) for train in tried] == [(1e-4, 3), (3e-3, 3)]


def test_a_plan_says_which_cells_an_algorithm_refuses(declared):
    axes = {
        "row": {"fine": {}, "wrong": {"algorithm": "fedprox", "algorithm.mew": 1.0}, "none": {"algorithm": "fedagv"}}
    }
    refused = runner.check(Benchmark.load(declared(axes=axes)))
    assert set(refused) == {"wrong", "none"}
    assert "mew" in refused["wrong"] and "did you mean fedavg" in refused["none"]


def test_words_can_be_tried_and_a_choice_stays_once_it_is_made(declared, tmp_path, monkeypatch):
    tried = {"pilot": {"train.optimizer": ["adamw", "sgd"]}, "seeds": [1], "axes": {"row": {"fedavg": {}}}}
    benchmark, out, said = Benchmark.load(declared(**tried), "small"), tmp_path / "out", []
    with heard_by(said.append):
        (first,) = run_benchmark(benchmark, out)
    assert f"  chosen train.optimizer={first.chosen['train.optimizer']}" in said
    monkeypatch.setattr(runner, "_validation_loss", lambda folder: float("1" in folder.name))  # others would win now
    other = [c for c in first.cell.choices() if c != first.chosen]
    assert len(other) == 1
    (again,) = run_benchmark(benchmark, out)
    shutil.rmtree(out / "pilots")
    (without,) = run_benchmark(benchmark, out)
    assert again.chosen == first.chosen
    assert without.measured == first.measured and not without.trouble


def test_a_pilot_that_had_no_room_is_run_again_and_not_passed_over(declared, tmp_path, monkeypatch):
    tried = {"pilot": {"train.lr": [1e-6, 1e-2]}, "seeds": [1], "axes": {"row": {"fedavg": {}}}}
    benchmark, out, finish = Benchmark.load(declared(**tried), "small"), tmp_path / "out", runner._finish

    def full(recipe: Any, folder: Path) -> Any:
        if folder == out / "pilots" / "fedavg" / "1":
            raise RunFailed("no space left")
        return finish(recipe, folder)

    monkeypatch.setattr(runner, "_finish", full)
    (outcome,) = run_benchmark(benchmark, out)
    assert outcome.trouble == "no space left" and not outcome.measured
    monkeypatch.undo()
    (outcome,) = run_benchmark(benchmark, out)
    assert outcome.chosen == {"train.lr": 1e-2} and not outcome.trouble


def test_a_cell_that_lacks_a_run_is_neither_best_nor_in_a_ratio(declared, tmp_path, monkeypatch):
    stated = {"local_over_federated": {"column": "loss", "over": ["local", "federated"]}}
    axes = {"row": {"federated": {}, "local": {"algorithm": "local"}}}
    benchmark = Benchmark.load(declared(axes=axes, ratios=stated, seeds=[1, 2, 3]))
    finish = runner._finish

    def failing(recipe: Any, folder: Path) -> Any:
        if (recipe.algorithm.name, recipe.seed) == ("local", 2):
            raise RunFailed("it diverged")
        return finish(recipe, folder)

    monkeypatch.setattr(runner, "_finish", failing)
    found = rows(run_benchmark(benchmark, tmp_path / "out"))
    assert [(row.seeds, row.trouble) for row in found] == [(3, ""), (2, "seed 2: it diverged")]
    assert ratios(benchmark, found) == {"local_over_federated": None}
    loss = next(c for c in COLUMNS if c.key == "loss")
    assert best([replace(found[1], means={**found[1].means, "loss": 0.0}), found[0]], loss) == found[0].means["loss"]
    assert "local (2 of 3 seeds)" in to_latex(found, "t", [found])


def test_only_rows_that_differ_in_the_last_axis_compare(declared, tmp_path):
    """The loss on one corpus is neither better nor worse than that on another."""
    benchmark = Benchmark.load(declared(seeds=[1]), "small")
    (row, *_) = rows(run_benchmark(benchmark, tmp_path / "out", only="own/federated"))
    loss = next(c for c in COLUMNS if c.key == "loss")

    def of(corpus: str, algorithm: str, value: float | None, trouble: str = "") -> Row:
        place = {"corpus": corpus, "row": algorithm}
        return replace(row, name="/".join(place.values()), place=place, means={"loss": value}, trouble=trouble)

    found = [of("a", "x", 0.5), of("a", "y", 0.4), of("b", "x", 2.5), of("b", "y", 2.6), of("b", "z", 2.5, "lacks one"),
             of("c", "x", None)]  # fmt: skip
    assert bests(alike(found).values(), [loss]) == {("a/y", "loss"), ("b/x", "loss")}
    assert bests([], [loss]) == set()


def test_what_a_kill_left_half_written_is_in_nobodys_way(declared, tmp_path):
    benchmark = Benchmark.load(declared(axes={"row": {"fedavg": {}}}, seeds=[1]))
    out = tmp_path / "out"
    out.mkdir()
    (out / ".benchmark.json-x1.tmp").write_text("hal")
    (first,) = run_benchmark(benchmark, out)
    shutil.rmtree(out / "cells/fedavg/1")
    (out / "cells/fedavg/1").mkdir()
    (out / "cells/fedavg/1/.recipe.yaml-x2.tmp").write_text("hal")
    (again,) = run_benchmark(benchmark, out)
    assert not again.trouble
    assert again.measured[1]["adapter_sha256"] == first.measured[1]["adapter_sha256"]
    (out / "benchmark.json").unlink()
    with pytest.raises(UserError, match="is not empty and has no benchmark"):
        run_benchmark(benchmark, out)


def test_another_benchmark_in_the_folder_is_refused(declared, tmp_path):
    run_benchmark(Benchmark.load(declared(seeds=[1]), "small"), tmp_path / "out", only="own/local")
    with pytest.raises(UserError, match=r"has another benchmark \(seeds differ\): name another --out"):
        run_benchmark(Benchmark.load(declared(seeds=[2]), "small"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and has no benchmark"):
        run_benchmark(Benchmark.load(declared(), "small"), tmp_path / "full")


def test_the_page_and_the_tabular(declared, tmp_path):
    benchmark = Benchmark.load(declared(seeds=[1], judged_by="loss_own"), "small")
    found = rows(run_benchmark(benchmark, tmp_path / "out", only="own"))
    page = write_benchmark(benchmark, "small", found, {}, tmp_path / "out").read_text()
    best = min(found[:3], key=lambda row: row.means["loss"])
    column = next(c for c in COLUMNS if c.key == "loss")
    assert f"<b>{best.text(column)}</b>" in page
    assert page.count("not run yet") == 3
    assert "<h2>Mean own loss against compute</h2>" in page and "<h2>Loss against compute</h2>" not in page
    board = leaderboard([tmp_path / "out"])
    assert [row.trouble for row in board.rows] == [""] * 3 + ["not run yet"] * 3
    assert [row.name for row in board.rows[:3]] == [r.name for r in sorted(found[:3], key=lambda r: r.means["loss"])]
    assert "100 % table" in page and "<script src" not in page
    tabular = to_latex(found, benchmark.description, list(alike(found).values()))
    assert rf"\textbf{{{best.text(column)}}}" in tabular
    assert r"a small one \& its 100 \% table" in tabular
    assert tabular.count(r" \\") == 1 + len(found)


def test_a_point_without_cost_stands_at_the_edge():
    points = (Point("free", 0.0, 1.0, "c0"), Point("dear", 1e6, 2.0, "c1"), Point("cheap", 1e3, 1.5, "c1"))
    drawn = str(draw(Scatter("t", "bytes", "size", "loss", points), 400, 300))
    centres = [float(part.split('"')[0]) for part in drawn.split('cx="')[1:]]
    free, cheap, dear = centres  # from the lowest y on
    assert free == 52.0 < cheap < dear


def test_a_name_lies_over_no_other_point():
    """Its name is on the left where another point stands on its right; shut in on both sides it has none."""

    def anchors(*xs: float) -> dict[str, str]:
        points = tuple(Point(f"point{i}", x, 1.0, "c0") for i, x in enumerate(xs))
        drawn = str(draw(Scatter("t", "bytes", "size", "loss", points), 800, 300)).split("<circle")[1:]
        return {f"point{i}": re.findall(r'text-anchor="(\w+)">point', part) for i, part in enumerate(drawn)}

    assert list(anchors(1e2, 1e5, 1e9).values()) == [["start"], ["start"], ["end"]]  # the outer two stand at the edges
    assert list(anchors(1e2, 1e5, 1.2e5, 1e9).values()) == [["start"], ["end"], ["start"], ["end"]]
    assert list(anchors(1e2, 1e5, 1.2e5, 1.4e5, 1e9).values()) == [["start"], ["end"], [], ["start"], ["end"]]


def smoke(name: str, *points: str) -> Benchmark:
    """A built-in benchmark's smallest size, smaller still, and of its only axis these points alone."""
    whole = Benchmark.load(name, "smoke")
    ((axis, known),) = whole.axes.items()
    base = {**whole.base, "data.limit": 64, "federation.rounds": 2, "train.steps": 2}
    return whole.model_copy(update={"base": base, "axes": {axis: {point: known[point] for point in points}}})


def test_a_message_is_as_long_as_what_is_trained(tmp_path, no_reports):
    benchmark = smoke("efficiency", "full", "lora").model_copy(
        update={"ratios": {k: v for k, v in Benchmark.load("efficiency").ratios.items() if k.endswith("over_lora")}}
    )
    found = rows(run_benchmark(benchmark, tmp_path / "out"))
    for row in found:
        numbers = 4 * row.means["parameters"]  # float32; names and a header come on top
        for key in ("message_up_bytes", "message_down_bytes"):
            assert numbers < row.means[key] < numbers + 8000
    (line,) = lines(ratios(benchmark, found))
    full, lora = (row.means["message_up_bytes"] for row in found)
    assert line == f"upload_ratio_full_over_lora={full / lora:.4f}"


def test_the_same_layers_tuned_beside_fedot_and_alone_are_one_number(tmp_path, no_reports):
    benchmark = smoke("fedot", "full model", "fedot, 20 % dropped").model_copy(update={"ratios": {}})
    alone, beside = rows(run_benchmark(benchmark, tmp_path / "out"))
    assert beside.means["full_tuned"] == alone.means["loss"] < alone.means["loss_before"]
    assert beside.means["loss_before"] == pytest.approx(alone.means["loss_before"], abs=1e-6)
    assert beside.means["emulator_before"] > beside.means["loss_before"] + 1e-3
    assert beside.means["emulator_tuned"] < beside.means["emulator_before"]
    assert 0 < beside.means["left_server"] < 1
    assert alone.means["left_server"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process forget its peak")
def test_the_memory_of_a_run_is_not_that_of_the_one_before():
    held = bytearray(b"x" * 400_000_000)
    high = peak_memory_bytes()
    del held
    reset_peak_memory()
    assert peak_memory_bytes() < high - 300_000_000
