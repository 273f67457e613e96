"""A benchmark as its YAML file declares it: one recipe, the axes along which it changes, and the pilot's choices.

    base: {...}                     a recipe's keys, nested or dotted, the same in every cell
    axes:                           a cell is one point of every axis; the last axis changes fastest
      corpus: {dolly: {...}, ...}   point → the keys that it changes
      algorithm: {all: algorithms}  … or a point for each registered algorithm (`personal algorithms`: for each whose
                                    clients keep their own model); further points add one algorithm's settings
    pilot: {train.lr: [1e-3, 3e-3]} values to try in a short run; the lowest validation loss wins. A point may have its
                                    own pilot, or `pilot_of: POINT`: use what that point of the same axis chose
    pilot_values: {...}             what makes a run short
    seeds: [42, 43]
    ratios: {a_over_b: {column: loss, over: [a, b]}}    a number of one point divided by another's
    terminal: [loss, upload_bytes]  the columns that the terminal shows; files have them all
    judged_by: loss_own             the column that plots show against traffic and compute; loss by default
    sizes: {smoke: {...}, ...}      base, pilot, pilot_values, seeds: replace those above

This file knows recipes and the names of columns. It does not know how cells are run or shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedloom.common import registry
from fedloom.common.complaints import first_complaint
from fedloom.common.errors import UserError, suggest
from fedloom.common.yaml import load_yaml
from fedloom.experiment.benchmark.columns import NAMED
from fedloom.recipe.recipe import Recipe

#: A recipe's dotted keys and their values.
Values = dict[str, Any]


#: Key → the values that a pilot tries for it.
Choices = dict[str, Annotated[list[Any], Field(min_length=1)]]


#: The words that select many registered algorithms on an axis.
EVERY: dict[str, Callable[[str], bool]] = {
    "algorithms": lambda name: True,
    "personal algorithms": lambda name: registry.algorithms.get(name).properties.personal,
}


#: What the terminal shows unless a benchmark says otherwise.
TERMINAL = (
    "score", "loss_before", "loss", "loss_own", "loss_worst_client", "train_tokens", "upload_bytes", "cpu_seconds",
)  # fmt: skip


class Size(BaseModel):
    """What a size changes in a benchmark; an empty field keeps the benchmark's value."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    description: str = ""
    base: Values = Field(default_factory=dict)
    pilot: Choices | None = None
    pilot_values: Values = Field(default_factory=dict)
    seeds: list[int] | None = None
    leave_out: list[str] = Field(default_factory=list)


class Ratio(BaseModel):
    """A number of the first point divided by that of the second, with everything else equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    column: str
    over: tuple[str, str]


class Benchmark(BaseModel):
    """A matrix of recipes (the module's docstring explains each key).

    Attributes:
        judged_by: the column that plots show against traffic and compute.
        leave_out: points without a cell.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    description: str
    base: Values = Field(default_factory=dict)
    axes: dict[str, dict[str, Any]]
    pilot: Choices = Field(default_factory=dict)
    pilot_values: Values = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=lambda: [42], min_length=1)
    sizes: dict[str, Size] = Field(default_factory=dict)
    leave_out: list[str] = Field(default_factory=list)
    ratios: dict[str, Ratio] = Field(default_factory=dict)
    terminal: list[str] = Field(default_factory=lambda: list(TERMINAL))
    judged_by: str = "loss"

    @classmethod
    def load(cls, source: str, size: str | None = None) -> Benchmark:
        """Load a built-in benchmark by name, or a YAML file, at one of its sizes. Raises UserError if it is not valid."""
        path = find_benchmark(source)
        try:
            values = load_yaml(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"benchmark {path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UserError(
                f"benchmark {path} holds {type(values).__name__}, not a mapping of keys: see docs/benchmarks.md"
            )
        try:
            found = cls.model_validate({"name": path.stem, **values})
        except ValidationError as error:
            raise UserError(f"benchmark {path}: {first_complaint(error)}") from None
        found._check_points()
        found._check_columns()
        return found.at(size)

    def _check_points(self) -> None:
        """Raise UserError if a point is not a mapping of a recipe's keys, or its pilot has no values to try."""
        for axis, points in self.axes.items():
            for name, values in points.items():
                where = f"benchmark {self.name}: axes.{axis}.{name}"
                if name == "all" or values is None:
                    continue
                if not isinstance(values, dict):
                    raise UserError(
                        f"{where} is {values!r}: a point is a mapping of a recipe's keys, as algorithm: {name}"
                    )
                tried = values.get("pilot", {})
                if not isinstance(tried, dict) or not all(isinstance(v, list) and v for v in tried.values()):
                    raise UserError(f"{where}.pilot is {tried!r}: it has a list of values for each key that it tries")

    def _check_columns(self) -> None:
        """Raise UserError if a column or a ratio names what does not exist."""
        for key in [*self.terminal, self.judged_by, *(ratio.column for ratio in self.ratios.values())]:
            if key not in NAMED:
                raise UserError(f"benchmark {self.name}: unknown column {key!r}: {suggest(key, NAMED)}")
        for name, ratio in self.ratios.items():
            self.axis_of(name, ratio)

    def axis_of(self, name: str, ratio: Ratio) -> str:
        """Return the axis that has both points of a ratio. Raises UserError if there is none."""
        for axis, points in self.axes.items():
            if set(ratio.over) <= set(_points(points, [])):
                return axis
        raise UserError(f"benchmark {self.name}: ratios.{name}: no axis has both {' and '.join(ratio.over)}")

    def at(self, size: str | None) -> Benchmark:
        """Return this benchmark with the changes of `size`; None takes the first size that is declared."""
        if not self.sizes:
            if size is None:
                return self
            raise UserError(f"the benchmark {self.name} has no sizes: leave out --size")
        name = size or next(iter(self.sizes))
        if name not in self.sizes:
            raise UserError(f"unknown size {name!r} of {self.name}: {suggest(name, list(self.sizes))}")
        chosen = self.sizes[name]
        return self.model_copy(
            update={
                "base": _over(self.base, chosen.base),
                "pilot": self.pilot if chosen.pilot is None else chosen.pilot,
                "pilot_values": _over(self.pilot_values, chosen.pilot_values),
                "seeds": chosen.seeds or self.seeds,
                "leave_out": [*self.leave_out, *chosen.leave_out],
            }
        )

    def cells(self) -> list[Cell]:
        """Return every combination of points, one of each axis, in the order of the axes."""
        axes = {axis: _points(points, self.leave_out) for axis, points in self.axes.items()}
        return [self._cell(axes, dict(zip(axes, names, strict=True))) for names in itertools.product(*axes.values())]

    def _cell(self, axes: Mapping[str, Mapping[str, Values]], place: dict[str, str]) -> Cell:
        values, pilot, leaders = dict(self.base), dict(self.pilot), dict(place)
        for axis, name in place.items():
            changes = dict(axes[axis][name])
            pilot |= changes.pop("pilot", {})
            leaders[axis] = changes.pop("pilot_of", name)
            if leaders[axis] not in axes[axis]:
                raise UserError(
                    f"benchmark {self.name}: axes.{axis}.{name}.pilot_of={leaders[axis]}: no such point: "
                    f"{suggest(leaders[axis], axes[axis])}"
                )
            values = _over(values, changes)
        led = leaders != place
        if led and any("pilot_of" in axes[axis][leader] for axis, leader in leaders.items()):
            raise UserError(
                f"benchmark {self.name}, {'/'.join(place.values())}: pilot_of names a point that has pilot_of itself: "
                "name the one that has the pilot"
            )
        leader = self._cell(axes, leaders) if led else None
        return Cell(
            benchmark=self.name, place=place, values=values, pilot=leader.pilot if leader else pilot,
            pilot_values=self.pilot_values, leader=leader,
        )  # fmt: skip


class Cell(BaseModel):
    """One point of the matrix.

    Attributes:
        place: axis → point.
        values: dotted keys and values of its recipe.
        pilot: key → the values to try for it.
        pilot_values: the keys and values that make the pilot's runs short.
        leader: the cell whose pilot also chooses for this one; None: this cell has its own pilot.
    """

    model_config = ConfigDict(frozen=True)
    benchmark: str
    place: dict[str, str]
    values: Values
    pilot: Choices
    pilot_values: Values
    leader: Cell | None = None

    @property
    def name(self) -> str:
        return "/".join(self.place.values())

    def recipe(self, seed: int, more: Mapping[str, Any] | None = None) -> Recipe:
        """Build the recipe of this cell. Raises UserError, with the cell's name, if a key is wrong."""
        values = _over({**self.values, "name": self.name.replace("/", "-"), "seed": seed}, more or {})
        try:
            return Recipe.parse({}, values)
        except UserError as error:
            raise UserError(f"benchmark {self.benchmark}, {self.name}: {error}") from None

    def choices(self) -> list[Values]:
        """Return every combination of the pilot's values; without a pilot one empty combination."""
        return [dict(zip(self.pilot, chosen, strict=True)) for chosen in itertools.product(*self.pilot.values())]


def _over(values: Values, changes: Mapping[str, Any]) -> Values:
    """Return `values` with `changes` applied: a section that changes replaces all its earlier dotted keys."""
    left = {k: v for k, v in values.items() if k not in changes and not any(k.startswith(f"{c}.") for c in changes)}
    return {**left, **changes}


def _points(points: Mapping[str, Any], leave_out: list[str]) -> dict[str, Values]:
    """Expand an axis: each point with its keys and values."""
    found: dict[str, Values] = {}
    for name, values in points.items():
        if name != "all":
            found[name] = {**found.get(name, {}), **(values or {})}
        elif values in EVERY:
            every = [algorithm for algorithm in registry.algorithms.names() if EVERY[values](algorithm)]
            found |= {algorithm: {"algorithm": algorithm, **found.get(algorithm, {})} for algorithm in every}
        else:
            raise UserError(f"an axis has all: {values!r}: the only words that it may have are {', '.join(EVERY)}")
    return {name: values for name, values in found.items() if name not in leave_out}


def builtin_benchmarks() -> dict[str, Path]:
    """Return name → file of every built-in benchmark."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def find_benchmark(source: str) -> Path:
    """Find the file of a benchmark by name or path. Raises UserError if there is none."""
    builtin = builtin_benchmarks()
    if source in builtin:
        return builtin[source]
    if Path(source).is_file():
        return Path(source)
    raise UserError(f"unknown benchmark {source!r}: {suggest(source, builtin)}")
