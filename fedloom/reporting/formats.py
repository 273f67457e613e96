"""Format numbers for people: 48.2 MB, 3 min 12 s, 62.5 %. A missing value is a dash.

No-break spaces join numbers and units. `data` keeps the exact value beside the rounded one, in HTML's <data value="…">.
This file does not know what a number means.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

DASH = "–"


GAP = "\u00a0"


BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def loss(value: float) -> str:
    return f"{value:.3f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}{GAP}%"


def points(value: float) -> str:
    """Format a difference of two shares, in percentage points, signed."""
    return f"{100 * value:+.1f}{GAP}points".replace("-", "−")


def change(value: float) -> str:
    """Format a difference of two losses, signed."""
    return f"{value:+.3f}".replace("-", "−")


def count(value: float) -> str:
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Format bytes in decimal units."""
    return _scaled(value, BYTES)


def short(value: float) -> str:
    """Format a large number with its SI letter: 1.2 M."""
    return _scaled(value, ("", "k", "M", "G", "T", "P", "E")).strip()


def digits(value: float) -> str:
    """Format a number with three significant digits: 6.57, 0.0123."""
    return f"{value:.3g}"


def duration(value: float) -> str:
    """Format seconds in at most two units."""
    if round(value, 1) < 60:
        return f"{value:.1f}{GAP}s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{GAP}min {seconds}{GAP}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{GAP}h {minutes}{GAP}min"


def moment(value: Any) -> str:
    """Format an ISO time for people, in UTC; any other value is returned as text."""
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    when = when.astimezone(UTC) if when.tzinfo else when
    return f"{when.day} {when:%B %Y, %H:%M}" + (" UTC" if when.tzinfo else "")


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step, most = (
        0,
        999.5,
    )  # a value that rounds to 1000 gets the next unit; from the second unit on there is one decimal
    while step + 1 < len(units) and abs(value) >= most:
        value /= 1000
        step, most = step + 1, 999.95
    return f"{value:.0f}{GAP}{units[0]}" if step == 0 else f"{value:.1f}{GAP}{units[step]}"


FORMATS: dict[str, Callable[[float], str]] = {
    f.__name__: f for f in (loss, percent, points, change, count, size, short, digits, duration)
}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def text(value: Any, kind: str) -> str:
    """Format `value` in the format `kind`; a dash where it is not a number."""
    return FORMATS[kind](value) if is_number(value) else DASH


def data(value: Any, kind: str) -> Markup:
    """Format `value` like `text`, with the exact value in a <data> element."""
    if not is_number(value):
        return Markup('<span class="none" title="not measured">–</span>')
    return Markup('<data value="{}">{}</data>').format(value, FORMATS[kind](value))
