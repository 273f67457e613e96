"""Draw line charts and bar charts as inline SVG from plain numbers.

Every drawing contains its own numbers (`data-values`). The page's script shows them under the pointer, and a test
compares them with the events. Colours are classes from charts.css. This file does not know what a run is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup

from fedloom.reporting import formats

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Line:
    """One line over rounds. `style` is a class of charts.css: all, worst, context, or c0 … c8."""

    name: str
    points: Points
    style: str


@dataclass(frozen=True)
class Band:
    """The area between two lines; `style` is outer or inner."""

    name: str
    lower: Points
    upper: Points
    style: str


@dataclass(frozen=True)
class LineChart:
    """The lines and bands to draw.

    Attributes:
        unit: of the values, a name in `formats.FORMATS`.
        zero: start the vertical axis at 0.
        across: the title of the horizontal axis.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    bands: tuple[Band, ...] = ()
    zero: bool = False
    across: str = "round"

    @property
    def values(self) -> list[float]:
        edges = [edge for band in self.bands for edge in (band.lower, band.upper)]
        return [y for points in (*(line.points for line in self.lines), *edges) for _, y in points]

    @property
    def rounds(self) -> list[int]:
        return sorted({x for line in self.lines for x, _ in line.points})

    def rows(self) -> list[tuple[str, list[float | None]]]:
        """Return the chart as a table: a row for each line and band edge, a column for each of `rounds`."""
        named = [(line.name, line.points) for line in self.lines]
        for band in self.bands:
            low, high = band.name.split(" to ")
            named += [(low, band.lower), (high, band.upper)]
        return [(name, [dict(points).get(x) for x in self.rounds]) for name, points in named]


@dataclass(frozen=True)
class BarChart:
    """Stacked bars over rounds: `stacks` are (name, round → value, style)."""

    title: str
    unit: str
    stacks: tuple[tuple[str, dict[int, float], str], ...]

    @property
    def rounds(self) -> list[int]:
        return sorted({x for _, values, _ in self.stacks for x in values})

    def rows(self) -> list[tuple[str, list[float | None]]]:
        return [(name, [values.get(x) for x in self.rounds]) for name, values, _ in self.stacks]


@dataclass(frozen=True)
class Frame:
    """Maps rounds and values to the drawing's units. `labels` is the space on the right for names."""

    top: ClassVar[int] = 14
    bottom: ClassVar[int] = 34

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    labels: int = 12
    left: int = 52
    ticks: tuple[float, ...] = field(default=())

    @property
    def right(self) -> float:
        return self.width - self.labels

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.floor - up * (self.floor - self.top)


def nice_ticks(low: float, high: float, wanted: int = 5) -> tuple[float, ...]:
    """Return about `wanted` round values that cover low … high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal up to rounding: one client's loss and the mean over it
        high = low + (abs(low) or 1.0)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def round_ticks(rounds: Sequence[int], wanted: int) -> list[int]:
    """Return the rounds to write under the axis."""
    low, high = min(rounds), max(rounds)
    step = max(1, math.ceil((high - low) / wanted))
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500) if s >= step), step)
    return [x for x in range(low, high + 1) if x % step == 0 or x == low == high]


def tick_labels(ticks: Sequence[float], unit: str) -> list[str]:
    """Format ticks with as many decimals as their step needs. Bytes and time are in the largest tick's unit."""
    if unit == "size":
        power = max(0, min(5, int(math.log10(max(ticks[-1], 1.0)) // 3)))
        scale, suffix = 1000.0**power, " " + formats.BYTES[power]
    elif unit == "duration":
        scale, suffix = (60.0, " min") if ticks[-1] >= 600 else (1.0, " s")
    else:
        scale, suffix = (0.01, "%") if unit == "percent" else (1.0, "")
    step = (ticks[1] - ticks[0]) / scale
    decimals = next(d for d in range(6) if d == 5 or abs(step - round(step, d)) < 1e-6)
    return [f"{tick / scale:.{decimals}f}{suffix}" for tick in ticks]


def _axes(frame: Frame, rounds: Sequence[int], unit: str, along: str = "round") -> Markup:
    parts = []
    for value, label in zip(frame.ticks, tick_labels(frame.ticks, unit), strict=True):
        _, y = frame.at(frame.x[0], value)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(frame.left, frame.right, y, y)
            + Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                frame.left - 8, y + 4, label
            )
        )
    for x in round_ticks(rounds, 10 if frame.width > 500 else 6):
        across, _ = frame.at(x, frame.y[0])
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                across, frame.floor + 18, x
            )
        )
    parts.append(
        Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="end">{}</text>').format(
            frame.right, frame.floor + 32, along
        )
    )
    return Markup("").join(parts)


def _path(frame: Frame, points: Points) -> str:
    return "M" + "L".join("{:.1f},{:.1f}".format(*frame.at(x, y)) for x, y in points)


def line_chart(chart: LineChart, width: int, height: int, label_room: int = 0) -> Markup:
    """Draw the chart as an <svg> of width × height units. With `label_room` each line's name is at its end."""
    values, rounds = chart.values, chart.rounds
    ticks = nice_ticks(0.0 if chart.zero else min(values), max(values))
    last = max(*rounds, min(rounds) + 1)
    frame = Frame(width, height, (min(rounds), last), (ticks[0], ticks[-1]), label_room or 14, ticks=ticks)
    parts = [
        _axes(frame, rounds, chart.unit, chart.across),
        _end_labels(frame, chart.lines) if label_room else Markup(""),
    ]
    for band in chart.bands:
        outline = _path(frame, band.lower) + "L" + _path(frame, tuple(reversed(band.upper)))[1:] + "Z"
        parts.append(Markup('<path class="band {}" d="{}"/>').format(band.style, outline))
    for line in sorted(chart.lines, key=lambda line: (line.style == "all", line.style != "context")):
        dots = Markup("").join(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
                *frame.at(x, y), 3.4 if line.style == "all" else 2.6
            )
            for x, y in (line.points if len(rounds) <= 30 or len(line.points) == 1 else ())
        )
        parts.append(
            Markup('<g class="series {}" data-name="{}" data-values="{}"><path d="{}"/>{}</g>').format(
                line.style, line.name, json.dumps(line.points), _path(frame, line.points), dots
            )
        )
    return _svg(frame, chart.title, chart.unit, Markup("").join(parts))


def _end_labels(frame: Frame, lines: Sequence[Line]) -> Markup:
    """Draw names at the lines' ends, moved apart where they would overlap."""
    gap = 16.0
    ends = sorted((frame.at(*line.points[-1])[1], i) for i, line in enumerate(lines) if line.style != "context")
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + gap) if places else max(y, frame.top + 2))
    overshoot = places[-1] - frame.floor if places else 0.0
    for i in range(len(places) - 1, -1, -1):
        if overshoot > 0 and (i == len(places) - 1 or places[i] > places[i + 1] - gap):
            places[i] = frame.floor if i == len(places) - 1 else places[i + 1] - gap
    parts = []
    for (y, i), place in zip(ends, places, strict=True):
        line, x = lines[i], frame.right
        name = line.name if len(line.name) <= 18 else line.name[:17] + "…"
        end = frame.at(*line.points[-1])[0]
        lead = f"M{end + 5:.1f},{y:.1f}H{x + 5}L{x + 15},{place:.1f}"
        parts.append(
            Markup(
                '<g class="end {}" data-name="{}" data-toggle="{}" tabindex="0" role="button" aria-pressed="true">'
                '<path class="lead{}" d="{}"/><text x="{}" y="{:.1f}">{}</text></g>'
            ).format(line.style, line.name, line.name, " early" * (end < x), lead, x + 19, place + 4, name)
        )
    return Markup("").join(parts)


def bar_chart(chart: BarChart, width: int, height: int) -> Markup:
    """Draw stacked bars as an <svg>; the vertical axis starts at 0."""
    rounds = chart.rounds
    totals = [sum(values.get(x, 0.0) for _, values, _ in chart.stacks) for x in rounds]
    ticks = nice_ticks(0.0, max(totals) or 1.0, 4)
    frame = Frame(width, height, (min(rounds) - 0.6, max(rounds) + 0.6), (0.0, ticks[-1]), 10, left=64, ticks=ticks)
    thick = max(0.8, min(46.0, 0.66 * (frame.right - frame.left) / (max(rounds) - min(rounds) + 1.2)))
    parts = [_axes(frame, rounds, chart.unit)]
    base = dict.fromkeys(rounds, 0.0)
    for name, values, style in chart.stacks:
        bars = []
        for x, value in sorted(values.items()):
            across, low = frame.at(x, base[x])
            base[x] += value
            high = frame.at(x, base[x])[1]
            bars.append(
                Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                    across - thick / 2, high, thick, low - high
                )
            )
        parts.append(
            Markup('<g class="series bars {}" data-name="{}" data-values="{}">{}</g>').format(
                style, name, json.dumps(sorted(values.items())), Markup("").join(bars)
            )
        )
    return _svg(frame, chart.title, chart.unit, Markup("").join(parts))


def _svg(frame: Frame, title: str, unit: str, inner: Markup) -> Markup:
    plot = json.dumps([frame.left, frame.right, frame.top, frame.floor, *frame.x])
    return Markup(
        '<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}" data-unit="{}" data-plot="{}">'
        '{}<line class="cursor" y1="{}" y2="{}"/></svg>'
    ).format(title, frame.width, frame.height, unit, plot, inner, frame.top, frame.floor)
