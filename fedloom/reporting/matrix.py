"""Draw clients × categories as a matrix that shows how skewed a split is, for three clients or ten thousand.

Up to `MOST_ROWS` clients each get a labelled row with counts. More are thin rows, sorted by their largest category, and a
cell is the category's share of that client. With more than `MOST_THIN` clients, neighbouring rows are averaged. This file
does not know how the split was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

MOST_ROWS = 30


MOST_THIN = 240


MOST_COLUMNS = 24


@dataclass(frozen=True)
class Matrix:
    """The matrix to draw.

    Attributes:
        rows: client names, or empty strings where rows are thin.
        columns: category names, the last one "other (n)" where there are more than `MOST_COLUMNS`.
        cells: [rows, columns]; examples, or shares of a client's examples where rows are thin.
        sizes: [rows]; examples of each row's client (the mean where a row is several clients).
        thin: whether rows are unlabelled.
        clients: how many clients there are.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float, ...], ...]
    sizes: tuple[float, ...]
    thin: bool
    clients: int

    def caption(self) -> str:
        """Return one sentence on how to read the matrix."""
        if not self.thin:
            return "Each row is a client, each column a category; a cell is the number of that client's examples."
        rows = "Each thin row is a client" if len(self.rows) == self.clients else (
            f"Each thin row is the mean of about {round(self.clients / len(self.rows))} clients"
        )  # fmt: skip
        return (
            f"{rows}, sorted by the largest category; the darker a cell, the larger the category's share of the client."
        )


def build(split: Mapping[str, Any]) -> Matrix:
    """Build the matrix of a split.json."""
    clients: Sequence[Mapping[str, Any]] = split["clients"]
    columns, counts = _columns(split, clients)
    names = tuple(str(client["client"]) for client in clients)
    sizes = tuple(float(sum(row)) for row in counts)
    if len(clients) <= MOST_ROWS:
        return Matrix(names, columns, tuple(counts), sizes, False, len(clients))
    shares = [tuple(c / (total or 1.0) for c in row) for row, total in zip(counts, sizes, strict=True)]
    order = sorted(range(len(shares)), key=lambda i: _largest(shares[i]))
    chunk = math.ceil(len(order) / MOST_THIN)
    groups = [order[i : i + chunk] for i in range(0, len(order), chunk)]
    cells = tuple(tuple(_mean([shares[i][c] for i in group]) for c in range(len(columns))) for group in groups)
    return Matrix(
        ("",) * len(groups), columns, cells, tuple(_mean([sizes[i] for i in g]) for g in groups), True, len(clients)
    )


def _columns(
    split: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]
) -> tuple[tuple[str, ...], list[tuple[float, ...]]]:
    """Return the category names, and each client's counts in their order. The smallest categories become one."""
    totals: dict[str, int] = dict.fromkeys(split.get("categories") or (), 0)
    for client in clients:
        for category, number in (client.get("categories") or {}).items():
            totals[category] = totals.get(category, 0) + number
    kept = list(totals)
    if len(kept) > MOST_COLUMNS:
        largest = sorted(totals, key=lambda c: -totals[c])[: MOST_COLUMNS - 1]
        kept = [c for c in totals if c in largest]
    rest = [c for c in totals if c not in kept]
    counts = []
    for client in clients:
        own = client.get("categories") or {}
        row = [float(own.get(c, 0)) for c in kept]
        counts.append(tuple([*row, float(sum(own.get(c, 0) for c in rest))] if rest else row))
    names = [c or "(no category)" for c in kept] + ([f"other ({len(rest)})"] if rest else [])
    return tuple(names), counts


def _largest(shares: Sequence[float]) -> tuple[int, float]:
    top = max(range(len(shares)), key=lambda c: shares[c]) if shares else 0
    return top, -shares[top] if shares else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class _Grid:
    """Positions of the matrix's parts in a drawing of `width` units."""

    width: int
    left: int
    top: int
    bars: int
    row: float
    column: float
    slant: int

    @property
    def right(self) -> float:
        return self.width - self.bars


def _grid(matrix: Matrix, width: int) -> _Grid:
    wide = width > 500
    longest = max((len(name) for name in matrix.rows), default=0)
    left = 30 if matrix.thin else min(190 if wide else 104, 18 + 7 * longest)
    bars = 150 if wide else 66
    names = max((len(_cut(name)) for name in matrix.columns), default=0)
    column = (width - left - bars) / max(1, len(matrix.columns))
    slant = 32 if column >= 36 else 62
    slanted = 18 + round(names * 7.2 * math.sin(math.radians(slant)))
    row = max(1.5, min(5.0, 480 / len(matrix.rows))) if matrix.thin else 27.0
    return _Grid(width, left, slanted, bars, row, column, slant)


def _cut(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def draw(matrix: Matrix, width: int, title: str, style: str = "") -> Markup:
    """Draw the matrix as an <svg>. `style`: CSS to include, for a picture outside of a report."""
    grid = _grid(matrix, width)
    height = grid.top + grid.row * len(matrix.rows) + 8
    parts = [_headings(matrix, grid)]
    most = max((c for row in matrix.cells for c in row), default=1.0) or 1.0
    longest = max(matrix.sizes, default=1.0) or 1.0
    for r, (name, cells, size) in enumerate(zip(matrix.rows, matrix.cells, matrix.sizes, strict=True)):
        parts.append(_row(grid, r, name, cells, most, matrix.thin))
        parts.append(_size_bar(grid, r, size, longest, matrix.thin))
    if matrix.thin:
        middle = grid.top + grid.row * len(matrix.rows) / 2
        label = f"{matrix.clients:,} clients"
        parts.append(
            Markup(
                '<text class="tick" text-anchor="middle" transform="translate(16 {:.0f}) rotate(-90)">{}</text>'
            ).format(middle, label)
        )
    return Markup(
        '<svg class="chart matrix{}" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{}" '
        'viewBox="0 0 {} {:.0f}">{}{}</svg>'
    ).format(
        " thin" * matrix.thin,
        title,
        width,
        height,
        Markup(f"<style>{style}</style>") if style else "",
        Markup("").join(parts),
    )


def _headings(matrix: Matrix, grid: _Grid) -> Markup:
    parts = [
        Markup('<text class="tick" transform="translate({:.1f} {}) rotate(-{})">{}</text>').format(
            grid.left + (c + 0.5) * grid.column - (4 if grid.slant < 45 else -2), grid.top - 8, grid.slant, _cut(name)
        )
        for c, name in enumerate(matrix.columns)
    ]
    parts.append(
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="end">{}</text>').format(
            grid.width - 2, grid.top - 8, "examples"
        )
    )
    return Markup("").join(parts)


def _row(grid: _Grid, r: int, name: str, cells: Sequence[float], most: float, thin: bool) -> Markup:
    y, gap = grid.top + r * grid.row, 0.0 if thin else 2.0
    parts = []
    if not thin:
        room = max(8, int((grid.left - 12) / 6.6))
        parts.append(
            Markup('<text class="name" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                grid.left - 10, y + grid.row / 2 + 4.5, _cut(name, room)
            )
        )
    for c, cell in enumerate(cells):
        x = grid.left + c * grid.column
        shade = math.sqrt(cell / most) if cell else 0.0
        if shade or not thin:
            parts.append(
                Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" {}/>').format(
                    "cell" if cell else "void",
                    x, y + gap / 2, grid.column - 2, grid.row - gap,
                    Markup('fill-opacity="{:.2f}"').format(0.1 + 0.9 * shade) if cell else "",
                )
            )  # fmt: skip
        if cell and not thin and grid.column >= 9 * len(f"{cell:.0f}"):
            parts.append(
                Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="middle">{:.0f}</text>').format(
                    "count" + " deep" * (shade > 0.6) + " full" * (shade > 0.86),
                    x + grid.column / 2 - 1,
                    y + grid.row / 2 + 4,
                    cell,
                )
            )
    return Markup("").join(parts)


def _size_bar(grid: _Grid, r: int, size: float, longest: float, thin: bool) -> Markup:
    y = grid.top + r * grid.row
    room = grid.bars - (12 if thin else 60)
    bar = Markup("")
    if thin or grid.bars > 100:
        bar = Markup('<rect class="size" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            grid.right + 10,
            y if thin else y + grid.row / 2 - 3,
            max(0.0, room * size / longest),
            grid.row if thin else 6,
        )
    if thin:
        return bar
    return bar + Markup('<text class="total" x="{}" y="{:.1f}" text-anchor="end">{:,.0f}</text>').format(
        grid.width - 2, y + grid.row / 2 + 4, size
    )
