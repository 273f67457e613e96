"""Write report pages from run folders: numbers and charts in template.html, which escapes all values.

The page loads nothing: style, script and drawings are inside, and its content-security policy forbids the rest. This file
does not know how a run works; it shows a LoadedRun (loaded_run.py).
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from fedloom.common.errors import UserError
from fedloom.data.heterogeneity import describe_difference
from fedloom.reporting import charts, formats, matrix, svg
from fedloom.reporting import differences as settings
from fedloom.reporting.loaded_run import FILES, LoadedRun, read_run

#: Widths of a drawing for a desktop and for a phone; the stylesheet shows one of the two.
WIDE, NARROW = 860, 352


#: The most rows of a table of clients; the text beside the table says how many are left out.
MOST_ROWS = 200


#: The most charts of hooks' numbers; all numbers are in events.jsonl.
MOST_CHARTS = 24


Chart = svg.LineChart | svg.BarChart


def write_report(run: Path) -> Path:
    """Build `run`/report.html from the files of the run folder; returns its path.

    The page of an unfinished run, or of one with missing files, says what is missing. Raises UserError where `run` is not
    a run folder.
    """
    folder = read_run(run)
    return write_page(run / "report.html", "template.html", run_view(folder))


def report_many(runs: list[Path], out: Path) -> Path:
    """Write one page that compares several runs; returns its path. `out`: a file, or a folder for report.html.

    Raises UserError where there are no runs, or one is not a run folder.
    """
    if not runs:
        raise UserError("no runs to report: name at least one run folder, such as `fedloom report runs/NAME`")
    target = out / "report.html" if out.is_dir() else out
    target.parent.mkdir(parents=True, exist_ok=True)
    folders = dict(zip(run_names(runs), map(read_run, runs), strict=True))
    return write_page(target, "many.html", many_view(folders))


def run_view(run: LoadedRun) -> dict[str, Any]:
    """Return all values that template.html shows of one run."""
    events, order, worst = run.events, run.client_names, run.worst_client("loss")
    split = matrix.build(run.split) if run.split.get("clients") else None
    clients = _clients(run)
    return {
        "title": run.name,
        "run": run,
        "s": run.headline,
        "missing": [f"{name} {why}: {FILES[name]}" for name, why in run.missing.items()],
        "loss": figure(charts.evaluation_chart(events, "loss", worst, order), 380),
        "virtual": figure(charts.virtual_chart(events), 300),
        "measured": _count_measured(run),
        "training": figure(charts.training_chart(events, worst, order), 300),
        "score": figure(charts.evaluation_chart(events, "score", run.worst_client("score"), order), 340),
        "privacy": run.privacy,
        "spent": figure(charts.privacy_chart(events), 260),
        "stopped": next(iter(run.events_of("run_stopped")), None),
        "hooks": [figure(chart, 220, wide=NARROW + 68) for chart in charts.hook_charts(events)[:MOST_CHARTS]],
        "bytes": figure(charts.bytes_chart(events), 250, wide=NARROW + 68),
        "seconds": figure(charts.seconds_chart(events), 250, wide=NARROW + 68),
        "split": split and {"caption": split.caption(), **_matrix(split)},
        "different": describe_difference(run.split.get("heterogeneity")),
        "split_rows": _split_rows(run.split) if split and not split.thin else [],
        "pooled": any(e["pooled"] for e in run.events_of("evaluation")),
        "failures": run.events_of("client_failed"),
        "updates": len(run.events_of("client_update")),
        "ages": _ages(run),
        "clients": clients[:MOST_ROWS],
        "clients_left_out": max(0, (run.headline.get("clients") or len(clients)) - len(clients[:MOST_ROWS])),
        "answers": run.answers.get("answers", []),
        "strip": _strip(run) if split and len(clients) <= charts.COLOURED else [],
    }


def many_view(runs: Mapping[str, LoadedRun]) -> dict[str, Any]:
    """Return all values that many.html shows of several runs."""
    events = {name: run.events for name, run in runs.items()}
    differs = settings.find_differences([settings.flatten(run.recipe) for run in runs.values()])
    return {
        "title": f"{len(runs)} runs side by side" if len(runs) > 1 else next(iter(runs)),
        "runs": [(name, run, run.headline, f"c{i % charts.COLOURED}") for i, (name, run) in enumerate(runs.items())],
        "loss": figure(charts.overlay_chart(events, "loss"), 380),
        "score": figure(charts.overlay_chart(events, "score"), 340),
        "offsite": [(name, run.summary["offsite"]) for name, run in runs.items() if run.summary.get("offsite")],
        "differing": [(key, [settings.text(value) for value in values]) for key, values in differs.items()],
        "missing": [f"{name}: {file} {why}" for name, run in runs.items() for file, why in run.missing.items()],
    }


def figure(chart: Chart | None, height: int, wide: int = WIDE) -> dict[str, Any] | None:
    """Draw a chart twice, for a desktop and a phone, with its numbers as a table and its names for the legend."""
    if chart is None:
        return None
    names: list[tuple[str, str]]
    if isinstance(chart, svg.LineChart):
        label = f"{chart.title}: {_describe_line(chart)}"
        drawn = svg.line_chart(chart, wide, height, 150), svg.line_chart(chart, NARROW, min(height, 290))
        names = [(line.name, line.style) for line in chart.lines if line.style != "context"]
        names += [(band.name, f"band {band.style}") for band in chart.bands]
    else:
        label = chart.title
        drawn = svg.bar_chart(chart, wide, height), svg.bar_chart(chart, NARROW, min(height, 230))
        names = [(name, style) for name, _, style in chart.stacks]
    return {
        "label": label, "wide": drawn[0], "narrow": drawn[1], "names": names, "context": _context(chart),
        "across": chart.across if isinstance(chart, svg.LineChart) else "round",
        "rounds": chart.rounds, "rows": chart.rows(), "unit": chart.unit,
    }  # fmt: skip


def _context(chart: Chart) -> int:
    """Return how many lines are drawn without a name."""
    return sum(line.style == "context" for line in chart.lines) if isinstance(chart, svg.LineChart) else 0


def _describe_line(chart: svg.LineChart) -> str:
    """Describe the first line in words, for readers who cannot see it."""
    line = chart.lines[0]
    (first, before), (last, after) = line.points[0], line.points[-1]
    before_text, after_text = formats.text(before, chart.unit), formats.text(after, chart.unit)
    return f"{line.name} from {before_text} in {chart.across} {first} to {after_text} in {chart.across} {last}"


def _matrix(table: matrix.Matrix) -> dict[str, Markup]:
    title = f"Examples of {table.clients} clients in {len(table.columns)} categories"
    return {"wide": matrix.draw(table, WIDE, title), "narrow": matrix.draw(table, NARROW, title)}


def _split_rows(split: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the split as table rows: the sizes of each client's sets, and its categories, largest first."""
    rows = []
    for client in split["clients"]:
        sizes = sorted((client.get("categories") or {}).items(), key=lambda item: -item[1])
        text = ", ".join(f"{name or '(no category)'} {number}" for name, number in sizes if number)
        rows.append({**client, "text": text})
    return rows


def _clients(run: LoadedRun) -> list[dict[str, Any]]:
    """Return the client table in the split's order; where it does not fit one screen, highest final loss first."""
    rows = [{"client": name, **values} for name, values in (run.headline.get("per_client") or {}).items()]
    sizes = {c["client"]: c for c in run.split.get("clients", [])}
    for row in rows:
        row.setdefault("train", sizes.get(row["client"], {}).get("train"))
        row.setdefault("test", sizes.get(row["client"], {}).get("test"))
    if len(rows) > charts.DRAWN:
        rows.sort(key=lambda row: -((row.get("loss") or {}).get("after") or 0.0))
    return rows


def _ages(run: LoadedRun) -> dict[str, Any] | None:
    """Return the ages of an asynchronous run's updates, and its virtual time; None for other runs."""
    rounds = [e for e in run.events_of("round_finished") if "staleness" in e["metrics"]]
    if not rounds:
        return None
    ages = [e["staleness"] for e in run.events_of("client_update")]
    virtual = rounds[-1]["metrics"].get("virtual_seconds")
    return {"mean": f"{sum(ages) / len(ages):.1f}", "oldest": max(ages), "virtual": virtual}


def _count_measured(run: LoadedRun) -> int:
    """Return how many clients the last evaluation measured."""
    last = next(iter(reversed(run.events_of("evaluation"))), None)
    return 0 if last is None else (last.get("spread") or {}).get("clients") or len(last["clients"])


def _strip(run: LoadedRun) -> list[tuple[str, int, str]]:
    """Return (client, training examples, colour) for the strip above the title."""
    return [(c["client"], c["train"], f"c{i}") for i, c in enumerate(run.split["clients"]) if c["train"]]


def run_names(runs: Sequence[Path]) -> list[str]:
    """Name each run by its folder, with as many parent folders as make the names unique."""
    paths = [run.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        twice = next(str(run) for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1)
        raise UserError(f"run {twice} is named twice: name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _difference(pair: Any, kind: str) -> Markup:
    """Format after − before of a {"before", "after"} mapping as `kind`."""
    pair = pair if isinstance(pair, Mapping) else {}
    before, after = pair.get("before"), pair.get("after")
    known = formats.is_number(before) and formats.is_number(after)
    return formats.data(after - before if known else None, kind)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedloom", "reporting"),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    kinds: dict[str, Callable[..., Any]] = {name: partial(formats.data, kind=name) for name in formats.FORMATS}
    environment.filters.update(kinds, difference=_difference, moment=formats.moment)
    script = _part("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(
        charts_css=Markup(charts.stylesheet()),
        page_css=Markup(_part("report.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        version=_version(),
    )
    return environment


def _part(name: str) -> str:
    return files("fedloom.reporting").joinpath(name).read_text(encoding="utf-8")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fedloom")
    except PackageNotFoundError:
        return ""


def write_page(path: Path, template: str, view: Mapping[str, Any]) -> Path:
    """Render a template of this folder to `path`; returns it."""
    return _write(path, _environment().get_template(template).render(**view))


def _write(path: Path, page: str) -> Path:
    """Write the page atomically: a reader never sees half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path
