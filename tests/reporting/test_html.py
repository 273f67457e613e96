"""The report shows what the run folder says: no more, no less, and nothing of it as markup."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedloom.common.errors import UserError
from fedloom.federation.record.events import SCHEMA, read_events
from fedloom.reporting import charts, formats, matrix, report_many, split_picture, svg, write_report
from tests.helpers import ROOT

Make = Callable[..., Path]
DOCS = ROOT / "docs" / "run-folder.md"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order. Keeps attributes, <data> values, text and drawn series."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.values: set[float] = set()
        self.parts: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in self.open or tag != "button"
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            self.values.add(float(dict(attrs)["value"] or "nan"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.parts.append(data)

    def drawn(self, label: str) -> list[dict[str, dict[int, float]]]:
        """The series of each drawing whose label begins so: name → round → value."""
        found: list[dict[str, dict[int, float]]] = []
        inside = False
        for tag, attrs in self.tags:
            if tag == "svg":
                inside = (attrs.get("aria-label") or "").startswith(label)
                found += [{}] if inside else []
            elif inside and "data-values" in attrs:
                found[-1][str(attrs["data-name"])] = dict(json.loads(attrs["data-values"] or ""))
        return found


def summary_of(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize(
    "options",
    [{}, {"num_clients": 3, "score": False}, {"num_clients": 20}, {"num_clients": 200}, {"finished": False}],
    ids=["plain", "no score", "20 clients", "200 clients", "interrupted"],
)
def test_page_is_well_formed_and_asks_for_nothing(run_folder: Make, options: dict[str, Any]) -> None:
    path = write_report(run_folder("a-run", **options))
    page = Page(path)
    assert path.name == "report.html"
    assert sorted(p.name for p in path.parent.glob("report.*")) == ["report.html"]
    loads = [(tag, v) for tag, a in page.tags for k, v in a.items() if k in {"src", "href", "srcset", "action"}]
    assert loads == [("link", "data:,")]
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "http://" not in page.text
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy
    assert "default-src 'none'" in policy
    assert [t for t, _ in page.tags].count("script") == 1
    assert path.stat().st_size < 500_000


def test_user_text_stays_text(run_folder: Make) -> None:
    run = run_folder("a-run", overrides={"name": "<img src=x onerror=alert(1)>", "description": "</style><b>bold</b>"})
    page = Page(write_report(run))
    assert "<script>alert('boo')</script> & \"quoted\" {{ 7 * 7 }}" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "</style><b>bold</b>" in page.text
    assert not [t for t, _ in page.tags if t == "img"]
    assert "<script>alert" not in page.source


def test_every_number_of_the_summary_is_on_the_page(run_folder: Make) -> None:
    run = run_folder("a-run", offsite=True)
    summary, page = summary_of(run), Page(write_report(run))
    shown = ("score", "loss", "cost", "per_client", "adapter", "data", "offsite")
    numbers = {float(v) for key in shown for v in leaves(summary[key]).values() if formats.is_number(v)}
    assert numbers <= page.values, sorted(numbers - page.values)
    assert summary["adapter_sha256"] in page.text
    assert "fedloom run recipe.yaml" in page.text
    for package, version in summary["versions"].items():
        assert package in page.text
        assert version in page.text
    assert formats.percent(summary["score"]["after"]).replace("\u00a0", " ") in page.text
    assert formats.loss(summary["loss"]["after"]) in page.text


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= leaves(value, f"{prefix}.{key}" if prefix else key)
    return out


def test_charts_draw_the_events(run_folder: Make) -> None:
    run = run_folder("a-run")
    events, page = read_events(run / "events.jsonl"), Page(write_report(run))
    evaluations = [e for e in events if e["event"] == "evaluation"]
    rounds = [e for e in events if e["event"] == "round_finished"]
    for label, key in (("Loss on the test data", "loss"), ("Score over rounds", "score")):
        expected = {c: {e["round"]: e["clients"][c][key] for e in evaluations} for c in evaluations[0]["clients"]}
        expected["all clients"] = {e["round"]: e[key] for e in evaluations}
        assert page.drawn(label) == [expected, expected]  # for a desktop and for a phone
    training = page.drawn("Training loss")[0]
    assert training["all clients"] == {e["round"]: e["loss"] for e in rounds}
    assert 2 not in training["letter_counting"]  # it failed in round 2
    up_down = page.drawn("Bytes for each round")[0]
    assert up_down["up"] == {e["round"]: e["upload_bytes"] for e in rounds}
    assert up_down["down"] == {e["round"]: e["download_bytes"] for e in rounds}
    assert page.drawn("Time for each round")[0]["seconds"] == {e["round"]: e["seconds"] for e in rounds}


def test_many_clients_become_bands_and_the_worst_stays_named(run_folder: Make) -> None:
    run = run_folder("a-run", num_clients=200)
    events = read_events(run / "events.jsonl")
    worst = summary_of(run)["loss"]["worst_client"]["client"]
    chart = charts.evaluation_chart(events, "loss", worst)
    assert chart is not None
    assert [line.name for line in chart.lines] == ["all clients", worst]
    last = [c["loss"] for c in [e for e in events if e["event"] == "evaluation"][-1]["clients"].values()]
    rows = dict(chart.rows())
    assert (rows["lowest client"][-1], rows["highest client"][-1]) == (min(last), max(last))
    assert min(last) < (rows["lower quartile"][-1] or 0) < (rows["upper quartile"][-1] or 0) < max(last)


def test_a_client_keeps_its_colour_whoever_answers_first() -> None:
    updates = [{"event": "client_update", "round": 1, "client": c, "loss": 1.0} for c in ("b", "a")]
    done = {"event": "round_finished", "round": 1, "loss": 1.0}
    chart = charts.training_chart([*updates, done], None, ["a", "b"])
    assert chart
    assert [(line.name, line.style) for line in chart.lines[1:]] == [("a", "c0"), ("b", "c1")]


def test_a_client_that_came_back_twice_in_a_round_is_drawn_once() -> None:
    updates = [
        {"event": "client_update", "round": r, "client": "a", "loss": x} for r, x in ((1, 4.0), (2, 3.0), (2, 1.0))
    ]
    chart = charts.training_chart([*updates, {"event": "round_finished", "round": 2, "loss": 2.5}], None)
    assert chart
    assert {line.name: line.points for line in chart.lines} == {"all clients": ((2, 2.5),), "a": ((1, 4.0), (2, 2.0))}


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_a_run_that_has_just_begun(run_folder: Make, kept: int) -> None:
    run = run_folder("a-run", finished=False)
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:kept]), encoding="utf-8")
    text = Page(write_report(run)).text
    assert "up to round 0 of 5" in text
    assert "No round has finished." in text
    assert ("No evaluation has finished." in text) == (kept == 1)


def test_failures_are_listed_or_said_to_be_none(run_folder: Make) -> None:
    run = run_folder("a-run")
    assert "2 letter_counting train non_finite loss nan at step 3 of 8" in Page(write_report(run)).text
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(line for line in lines if "client_failed" not in line), encoding="utf-8")
    assert "None: every client finished every piece of work." in Page(write_report(run)).text


def test_no_score_says_why(run_folder: Make) -> None:
    text = Page(write_report(run_folder("a-run", score=False))).text
    assert "No score: no suite of this corpus runs here" in text
    assert "not marked" in text


def test_interrupted_run_is_built_from_its_events(run_folder: Make) -> None:
    run = run_folder("a-run", finished=False)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "round_fin')  # killed while writing
    page = Page(write_report(run))
    assert "This run has not finished" in page.text
    assert "up to round 3 of 5" in page.text
    assert "summary.json is not there" in page.text
    assert "--resume" in page.text
    assert "not asked yet" in page.text
    events = read_events(run / "events.jsonl")
    evaluations = [e for e in events if e["event"] == "evaluation"]
    assert {evaluations[0]["loss"], evaluations[-1]["loss"], evaluations[-1]["score"]} <= page.values
    assert sum(e["upload_bytes"] for e in events if e["event"] == "client_update") in page.values


@pytest.mark.parametrize("left", ["recipe.yaml", "events.jsonl", "summary.json"])
def test_any_single_file_makes_a_page(run_folder: Make, left: str) -> None:
    run = run_folder("a-run")
    for file in run.iterdir():
        if file.name != left:
            file.unlink()
    page = Page(write_report(run))
    assert left == "recipe.yaml" or "0.9" in page.text
    assert "is not there" in page.text
    assert f"{left} is not there" not in page.text


def test_broken_files_are_named(run_folder: Make) -> None:
    run = run_folder("a-run")
    (run / "summary.json").write_text('{"name": ', encoding="utf-8")
    (run / "split.json").write_text("", encoding="utf-8")
    text = Page(write_report(run)).text
    assert "summary.json cannot be read" in text
    assert "split.json is empty" in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no runs to report"):
        report_many([], tmp_path / "out.html")


def test_several_runs_side_by_side(run_folder: Make, tmp_path: Path) -> None:
    runs = [
        run_folder("a/one"),
        run_folder("b/one", seed=9, overrides={"train.lr": 3e-4}),
        run_folder("c", finished=False),
    ]
    page = Page(report_many(runs, tmp_path / "pages" / "compare.html"))
    for run in runs[:2]:
        summary = summary_of(run)
        assert {summary["score"]["after"], summary["loss"]["after"], summary["cost"]["upload_bytes"]} <= page.values
    drawn = page.drawn("Loss on the test data, all clients")[0]
    assert len(drawn) == 3
    assert {name for name in drawn if name.endswith("one")} == {"a/one", "b/one"}
    events = read_events(runs[1] / "events.jsonl")
    assert drawn["b/one"] == {e["round"]: e["loss"] for e in events if e["event"] == "evaluation"}
    assert "train.lr 0.001 0.0003 0.001" in page.text
    assert "not finished, round 3 of 5" in page.text
    assert report_many(runs[:1], tmp_path / "pages") == tmp_path / "pages" / "report.html"
    with pytest.raises(UserError, match="named twice"):
        report_many([runs[0], runs[0]], tmp_path / "x.html")


@pytest.mark.parametrize("num_clients", [3, 8, 200])
def test_split_picture(run_folder: Make, tmp_path: Path, num_clients: int) -> None:
    split = json.loads((run_folder("a-run", num_clients=num_clients) / "split.json").read_text(encoding="utf-8"))
    for suffix in ("svg", "html"):
        picture = split_picture(split, tmp_path / "out" / f"split.{suffix}")
        text = picture.read_text(encoding="utf-8")
        assert text.count("<svg") == 1
        assert "prefers-color-scheme" in text
        assert "&lt;svg" not in text
    pytest.importorskip("matplotlib")
    assert split_picture(split, tmp_path / "split.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"name a \.svg, \.html, \.png or \.pdf"):
        split_picture(split, tmp_path / "split.gif")


def test_png_without_matplotlib_names_the_extra(
    run_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    split = json.loads((run_folder("a-run") / "split.json").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match=r'pip install "fedloom\[report\]"'):
        split_picture(split, tmp_path / "split.png")


def test_ten_thousand_clients_and_many_categories_stay_readable() -> None:
    clients = [{"client": str(i), "categories": {f"k{i % 60}": 3, f"k{i % 7}": 1}} for i in range(10_000)]
    table = matrix.build({"categories": [], "clients": clients, "splitter": "x", "seed": 1})
    assert len(table.rows) <= matrix.MOST_THIN
    assert len(table.columns) == matrix.MOST_COLUMNS
    assert table.columns[-1] == "other (37)"
    assert "mean of about" in table.caption()
    assert all(abs(sum(row) - 1) < 1e-9 for row in table.cells)


def test_ticks_are_round_and_cover_the_data() -> None:
    assert svg.nice_ticks(0.93, 2.31) == (0.5, 1.0, 1.5, 2.0, 2.5)
    assert svg.tick_labels((0.5, 1.0, 1.5), "loss") == ["0.5", "1.0", "1.5"]
    assert svg.tick_labels((0.0, 2e7, 4e7), "size") == ["0 MB", "20 MB", "40 MB"]
    assert svg.nice_ticks(1.0, 1.0)[0] <= 1.0 < svg.nice_ticks(1.0, 1.0)[-1]


def test_colours_stand_out_in_both_themes() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", charts.stylesheet(), flags=re.DOTALL)
    for theme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for name, colour in colours.items():
            least = 4.5 if name in {"ink", "soft", "good", "bad", "accent"} else 3.0
            assert name in {"paper", "wash", "rule"} or contrast(colour, colours["paper"]) >= least, name


def contrast(a: str, b: str) -> float:
    """WCAG 2's contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_docs_name_every_event_and_field() -> None:
    text = DOCS.read_text(encoding="utf-8").partition("\n## events.jsonl")[2].partition("\n## ")[0]
    documented = {}
    for section in text.split("\n### `")[1:]:
        documented[section.partition("`")[0]] = set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))
    assert documented == {event: set(fields) for event, fields in SCHEMA.items()}


def test_preferences_are_a_table_where_they_were_learned(run_folder: Make) -> None:
    text = Page(write_report(run_folder("a-run", overrides={"train.objective": "dpo"}))).text
    assert "48 test pairs" in text
    assert "pairs won 0.0 % 81.2 %" in " ".join(text.split())
    assert "1.234" in text
    assert "pairs won" not in Page(write_report(run_folder("b-run"))).text


def test_docs_name_every_key_of_the_summary(run_folder: Make) -> None:
    text = DOCS.read_text(encoding="utf-8").partition("\n## summary.json")[2].partition("\n## ")[0]
    first_cells = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    free = re.compile(r"^(data\.dropped|per_client|versions|environment)\.[^.]+")
    run = run_folder("a-run", overrides={"privacy.noise": 1.0, "train.objective": "dpo", "devices": {}}, offsite=True)
    keys = {free.sub(r"\1.*", key) for key in leaves(summary_of(run))}
    assert keys == set(re.findall(r"`([^`]+)`", first_cells))


def test_a_model_from_a_folder_is_named_without_its_path(run_folder: Make) -> None:
    run = run_folder("a-run", overrides={"model": "/home/somebody/models/tiny"})
    assert ": tiny with a LoRA adapter" in Page(write_report(run)).text
