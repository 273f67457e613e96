"""Draw a scatter plot of named points over a logarithmic axis, as inline SVG: cost against quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedloom.reporting import formats
from fedloom.reporting.svg import Frame, nice_ticks, tick_labels

#: The radius of a point, in pixels.
RADIUS = 4.5


@dataclass(frozen=True)
class Point:
    """A named point. `style`: a class of charts.css, c0 … c8; `group`: the colour's meaning."""

    name: str
    x: float
    y: float
    style: str
    group: str = ""


@dataclass(frozen=True)
class Scatter:
    """The plot to draw. The units are names of formats (formats.text). Points with x ≤ 0 are at the left edge."""

    title: str
    x_title: str
    x_unit: str
    y_unit: str
    points: tuple[Point, ...]


def draw(chart: Scatter, width: int, height: int) -> Markup:
    """Draw the plot. A point's name is beside it where there is room, and always in its tooltip."""
    positive = [p.x for p in chart.points if p.x > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high += high == low
    low -= any(p.x <= 0 for p in chart.points)
    ticks = nice_ticks(min(p.y for p in chart.points), max(p.y for p in chart.points))
    frame = Frame(width, height, (low, high), (ticks[0], ticks[-1]), labels=14, ticks=ticks)
    parts = [_axes(frame, chart)]
    points = sorted(chart.points, key=lambda p: (p.y, p.x, p.name))
    places = [frame.at(math.log10(p.x) if p.x > 0 else low, p.y) for p in points]
    taken = [(x - RADIUS, x + RADIUS, y) for x, y in places]  # a name must not cover another point
    for point, (x, y) in zip(points, places, strict=True):
        tooltip = f"{point.name}: {formats.text(point.y, chart.y_unit)}, {formats.text(point.x, chart.x_unit)}"
        parts.append(
            Markup(
                '<g class="series {}"><circle cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>{}</g>'
            ).format(point.style, x, y, RADIUS, tooltip, _name(frame, point.name, x, y, taken))
        )
    return Markup('<svg class="chart scatter" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        chart.title, width, height, Markup("").join(parts)
    )


def _axes(frame: Frame, chart: Scatter) -> Markup:
    parts = []
    for value, label in zip(frame.ticks, tick_labels(frame.ticks, chart.y_unit), strict=True):
        _, y = frame.at(frame.x[0], value)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(frame.left, frame.right, y, y)
            + Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                frame.left - 8, y + 4, label
            )
        )
    none = any(p.x <= 0 for p in chart.points)
    for power in range(int(frame.x[0]), int(frame.x[1]) + 1):
        x, _ = frame.at(power, frame.y[0])
        label = formats.text(0.0 if none and power == frame.x[0] else 10.0**power, chart.x_unit)
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x, frame.floor + 18, label
            )
        )
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(
            frame.right, frame.floor + 32, chart.x_title
        )
    )
    return Markup("").join(parts)


def _name(frame: Frame, name: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> Markup:
    """Draw the name right or left of its point; nothing where other names or points are on both sides."""
    width = 6.6 * len(name)
    sides: Sequence[tuple[float, str]] = ((x + 8, "start"), (x - 8 - width, "end"))
    for left, anchor in sides:
        inside = left >= frame.left and left + width <= frame.right
        if inside and all(abs(y - ty) >= 13 or left + width < tl or left > tr for tl, tr, ty in taken):
            taken.append((left, left + width, y))
            at = left if anchor == "start" else left + width
            return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
                at, y + 4, anchor, name
            )
    return Markup("")
