"""Build a run's charts from its events: loss and score over rounds, bytes and seconds a round, and the split.

The number of clients decides the drawing. Up to nine clients each get a colour. Up to thirty are thin lines behind the
mean and the worst one. More become bands: all clients, and their middle half. This file does not know how a page looks:
it turns events into `svg` charts, and a split into a picture of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedloom.common.errors import UserError
from fedloom.data.splitters import SplitTable
from fedloom.federation.record.client_table import quantile
from fedloom.federation.record.events import Event
from fedloom.reporting import formats, matrix
from fedloom.reporting.svg import Band, BarChart, Line, LineChart, Points

#: Up to so many clients, each has a colour.
COLOURED = 9


#: Up to so many clients, each has a line; more are drawn as bands.
DRAWN = 30


#: Units of virtual time, the coarsest first.
TIMES = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0), ("milliseconds", 1e-3))


#: The bands' names: "lower edge to upper edge".
OUTER, INNER = "lowest client to highest client", "lower quartile to upper quartile"


_BARE_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{}</title><style>body {{ background: var(--paper); margin: 24px auto; max-width: 900px }}</style>
{}
</html>"""


def stylesheet() -> str:
    """Return charts.css: the light and dark palettes and the style of each part of a drawing."""
    return files("fedloom.reporting").joinpath("charts.css").read_text(encoding="utf-8")


def evaluation_chart(
    events: Iterable[Event], key: str, worst: str | None, order: Sequence[str] = ()
) -> LineChart | None:
    """Draw `key` (loss or score) of every evaluation, over all clients and for each; None where nothing was measured.

    `order` lists all clients' names, so that a client has the same colour in every chart.
    """
    evaluations = [e for e in events if e["event"] == "evaluation"]
    overall = tuple((e["round"], float(e[key])) for e in evaluations if e[key] is not None)
    title = "Loss on the test data over rounds" if key == "loss" else "Score over rounds"
    unit = "loss" if key == "loss" else "percent"
    if any(e.get("spread") for e in evaluations):
        return _spread_chart(title, unit, overall, evaluations, key)
    clients: dict[str, list[tuple[int, float]]] = {}
    for e in evaluations:
        for client, values in e["clients"].items():
            if values.get(key) is not None:
                clients.setdefault(client, []).append((e["round"], float(values[key])))
    return _lines(title, unit, overall, clients, worst, order)


def _spread_chart(title: str, unit: str, overall: Points, evaluations: Sequence[Event], key: str) -> LineChart | None:
    """Draw evaluations of so many clients that events have only their spread."""
    edges = {e["round"]: e["spread"][key] for e in evaluations if e.get("spread") and e["spread"][key]}
    low, lower, upper, high = (
        tuple((x, float(values[name])) for x, values in edges.items())
        for name in ("lowest", "lower_quartile", "upper_quartile", "highest")
    )
    bands = (Band(OUTER, low, high, "outer"), Band(INNER, lower, upper, "inner")) if edges else ()
    lines = (Line("all clients", overall, "all"),)
    return LineChart(title, unit, lines, bands, zero=unit == "percent") if overall else None


def virtual_chart(events: Iterable[Event]) -> LineChart | None:
    """Draw the test loss over virtual time, in a unit that gives whole numbers; None where time is real."""
    known = [
        (e["virtual_seconds"] or 0.0, float(e["loss"]))
        for e in events
        if e["event"] == "evaluation" and e["loss"] is not None
    ]
    if not known or not (last := max(seconds for seconds, _ in known)):
        return None
    name, unit = next((n, u) for n, u in TIMES if last >= 20 * u or u == TIMES[-1][1])
    points = tuple(sorted({round(seconds / unit): loss for seconds, loss in known}.items()))
    lines = (Line("all clients", points, "all"),)
    return LineChart(f"Loss on the test data over virtual {name}", "loss", lines, across=f"virtual {name}")


def training_chart(events: Iterable[Event], worst: str | None, order: Sequence[str] = ()) -> LineChart | None:
    """Draw the mean training loss of each round, over all clients and for each; None before the first round.

    An asynchronous client may return two updates in a round; it is drawn at their mean.
    """
    events = list(events)
    overall = _points((e["round"], e["loss"]) for e in events if e["event"] == "round_finished")
    losses: dict[str, dict[int, list[float]]] = {}
    for e in events:
        if e["event"] == "client_update" and e["loss"] is not None:
            losses.setdefault(e["client"], {}).setdefault(e["round"], []).append(float(e["loss"]))
    clients = {c: [(r, sum(own) / len(own)) for r, own in sorted(rounds.items())] for c, rounds in losses.items()}
    return _lines("Training loss over rounds", "loss", overall, clients, worst, order)


def bytes_chart(events: Iterable[Event]) -> BarChart | None:
    """Draw uploaded and downloaded bytes of each finished round."""
    rounds = [e for e in events if e["event"] == "round_finished"]
    up = {e["round"]: float(e["upload_bytes"]) for e in rounds}
    down = {e["round"]: float(e["download_bytes"]) for e in rounds}
    return BarChart("Bytes for each round", "size", (("up", up, "up"), ("down", down, "down"))) if rounds else None


def seconds_chart(events: Iterable[Event]) -> BarChart | None:
    """Draw wall seconds of each finished round."""
    seconds = {e["round"]: float(e["seconds"]) for e in events if e["event"] == "round_finished"}
    return BarChart("Time for each round", "duration", (("seconds", seconds, "plain"),)) if seconds else None


def privacy_chart(events: Iterable[Event]) -> LineChart | None:
    """Draw ε spent after each round; None without differential privacy. With client noise, also the ε of the models."""
    rounds = [(e["round"], e["metrics"]) for e in events if e["event"] == "round_finished"]
    known = (("epsilon", "ε", "all"), ("epsilon_models", "ε of the models alone", "c0"))
    lines = [
        Line(name, points, style)
        for key, name, style in known
        if (points := _points((x, metrics.get(key)) for x, metrics in rounds))
    ]
    return LineChart("Privacy spent over rounds", "digits", tuple(lines), zero=True) if lines else None


def hook_charts(events: Iterable[Event]) -> list[LineChart]:
    """Draw each number that hooks logged, over rounds. A number of single clients is drawn as the mean over clients."""
    rounds = [(e["round"], e["metrics"]) for e in events if e["event"] == "round_finished"]
    names = dict.fromkeys(name for _, metrics in rounds for name in metrics if "/" in name)
    found = [(name, _points((x, metrics.get(name)) for x, metrics in rounds)) for name in names]
    return [LineChart(name, "digits", (Line(name, points, "all"),), zero=False) for name, points in found if points]


def overlay_chart(runs: Mapping[str, Sequence[Event]], key: str) -> LineChart | None:
    """Draw `key` over all clients, one line for each run."""
    lines = []
    for i, (name, events) in enumerate(runs.items()):
        points = _points((e["round"], e[key]) for e in events if e["event"] == "evaluation")
        if points:
            lines.append(Line(name, points, f"c{i % COLOURED}"))
    title = "Loss on the test data, all clients" if key == "loss" else "Score, all clients"
    unit = "loss" if key == "loss" else "percent"
    return LineChart(title, unit, tuple(lines), zero=key == "score") if lines else None


def _points(pairs: Iterable[tuple[int, Any]]) -> Points:
    return tuple((x, float(y)) for x, y in pairs if formats.is_number(y))


def _lines(
    title: str,
    unit: str,
    overall: Points,
    clients: Mapping[str, Sequence[tuple[int, float]]],
    worst: str | None,
    order: Sequence[str],
) -> LineChart | None:
    rank = {name: i for i, name in enumerate(order)}
    ordered = {n: tuple(clients[n]) for n in sorted(clients, key=lambda n: (rank.get(n, len(rank)), n))}
    many = max(len(clients), len(order))
    lines = [Line("all clients", overall, "all")] if overall else []
    bands: list[Band] = []
    if many <= COLOURED:
        colour = {name: rank.get(name, i if not rank else len(rank)) % COLOURED for i, name in enumerate(ordered)}
        lines += [Line(name, points, f"c{colour[name]}") for name, points in ordered.items()]
    elif many <= DRAWN:
        lines += [Line(n, points, "worst" if n == worst else "context") for n, points in ordered.items()]
    else:
        bands = _bands(clients)
        lines += [Line(n, points, "worst") for n, points in ordered.items() if n == worst]
    return LineChart(title, unit, tuple(lines), tuple(bands), zero=unit == "percent") if lines else None


def _bands(clients: Mapping[str, Sequence[tuple[int, float]]]) -> list[Band]:
    by_round: dict[int, list[float]] = {}
    for points in clients.values():
        for x, y in points:
            by_round.setdefault(x, []).append(y)

    def edge(share: float) -> Points:
        return tuple((x, quantile(sorted(ys), share)) for x, ys in sorted(by_round.items()))

    return [
        Band(OUTER, edge(0.0), edge(1.0), "outer"),
        Band(INNER, edge(0.25), edge(0.75), "inner"),
    ]


def split_picture(split: SplitTable, path: Path) -> Path:
    """Draw clients × categories of a split.json to `path`, in the format of its suffix; returns `path`.

    .png and .pdf need matplotlib.

    Raises:
        UserError: another suffix than .svg, .html, .png or .pdf, or matplotlib is not installed.
    """
    table = matrix.build(split)
    title = f"{table.clients} clients by {len(table.columns)} categories, split by {split['splitter']}"
    suffix = path.suffix.lower()
    if suffix not in {".svg", ".html", ".png", ".pdf"}:
        raise UserError(f"cannot draw a split as {path.name!r}: name a .svg, .html, .png or .pdf file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix in {".png", ".pdf"}:
        _picture_by_matplotlib(table, title, path)
        return path
    paper = "svg.chart { background: var(--paper); }"
    svg = matrix.draw(table, 900, title, stylesheet() + paper)
    if suffix == ".html":
        svg = Markup(_BARE_PAGE).format(title, svg)
    path.write_text(str(svg) + "\n", encoding="utf-8")
    return path


def _picture_by_matplotlib(table: matrix.Matrix, title: str, path: Path) -> None:
    try:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            f'drawing {path.name} needs matplotlib: pip install "fedloom[report]", or name a .svg file instead'
        ) from None
    rows, columns = len(table.rows), len(table.columns)
    figure = Figure(figsize=(2.5 + 0.65 * columns, 1.8 + (5.0 if table.thin else 0.32 * rows)), layout="constrained")
    axes = figure.add_subplot()
    shades = LinearSegmentedColormap.from_list("split", ["#f5f6f4", "#0f6b5e"])
    axes.imshow([[c**0.5 for c in row] for row in table.cells], cmap=shades, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(columns), table.columns, rotation=35, ha="left")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(title)
    if table.thin:
        axes.set_yticks([])
        axes.set_ylabel(f"{table.clients} clients, by largest category")
    else:
        axes.set_yticks(range(rows), [f"{n}  ({s:,.0f})" for n, s in zip(table.rows, table.sizes, strict=True)])
        most = max((c for row in table.cells for c in row), default=0.0)
        for r, row in enumerate(table.cells):
            for c, cell in enumerate(row):
                colour = "white" if cell > 0.6 * most else "black"
                if cell:
                    axes.text(c, r, f"{cell:.0f}", ha="center", va="center", fontsize=8, color=colour)
    figure.savefig(path, dpi=160)
