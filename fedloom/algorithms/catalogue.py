"""List the registered algorithms as a table, for the terminal and for the docs.

All of it comes from the classes: `Properties`, which tests check, and `About`, the family, paper and bytes. Bytes are
computed for one federation (`about.REFERENCE`) from formulas that tests compare with real messages. No model is loaded.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from fedloom.algorithms.about import FAMILIES, REFERENCE, About, Sizes, reference
from fedloom.algorithms.base import Algorithm, Properties
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.recipe.adapter import METHODS

#: The heading of algorithms that declare no family.
OTHERS = "others"


@dataclass(frozen=True)
class Entry:
    """One algorithm. `about` is None if its class declares none; `sizes` also if an option has no default."""

    name: str
    cls: type[Algorithm]
    about: About | None
    sizes: Sizes | None

    @property
    def properties(self) -> Properties:
        return self.cls.properties

    @property
    def family(self) -> str:
        """The heading that it is listed under."""
        return FAMILIES.get(self.about.family, OTHERS) if self.about else OTHERS

    @property
    def idea(self) -> str:
        """The first line of its module's docstring, or of its class's if the module has none."""
        text = sys.modules[self.cls.__module__].__doc__ or self.cls.__doc__ or ""
        return text.strip().split("\n")[0]

    def bytes(self, what: str) -> int | None:
        """Bytes in the reference federation; None if unknown. `what` is `up`, `down`, `server` or `client`."""
        if self.about is None or self.sizes is None:
            return None
        count: int = getattr(self.about, what)(self.sizes)
        return count

    def adapters(self, what: str) -> str:
        """`bytes` as a number of adapters, such as 2 or 0.5; ~0 below 0.001, ? if unknown."""
        count = self.bytes(what)
        if count is None or self.sizes is None:
            return "?"
        share = count / self.sizes.adapter
        return "~0" if 0 < share < 1e-3 else f"{share:.3g}"

    @property
    def methods(self) -> str:
        """The PEFT methods that it supports, as text."""
        return (
            "all" if self.properties.methods is None else ", ".join(m for m in METHODS if m in self.properties.methods)
        )


def entry(name: str) -> Entry:
    """Look up one algorithm. Raises UserError with the nearest name if `name` is not registered."""
    cls = registry.algorithms.get(name)
    about = vars(cls).get("about")
    if not isinstance(about, About):
        return Entry(name, cls, None, None)
    try:
        options = cls.Options()
    except ValidationError:  # an option without a default: bytes cannot be computed without a recipe
        return Entry(name, cls, about, None)
    return Entry(name, cls, about, reference(options))


def entries(*, lenient: bool = False) -> tuple[list[Entry], list[str]]:
    """List every algorithm, by family and then in the registry's order, and errors about those that cannot be imported.

    Args:
        lenient: collect the errors of algorithms that cannot be imported; otherwise the first UserError is raised.
    """
    order = [*FAMILIES.values(), OTHERS]
    found, troubles = [], []
    for name in registry.algorithms.names():
        try:
            found.append(entry(name))
        except UserError as error:
            if not lenient:
                raise
            troubles.append(str(error))
    return sorted(found, key=lambda e: order.index(e.family)), troubles


def shown(count: int | None) -> str:
    """Format bytes for a column: 9.8 MB, 16.4 kB, 0."""
    if count is None:
        return "?"
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{count} B" if count else "0"


#: Column of marks → the property that it stands for, and what that means.
MARKS = {
    "x": ("exact", "exact: the result is the mean of what the clients learned"),
    "s": ("linear_sum", "a plain sum of what clients send: privacy can be put around it"),
    "f": ("streams", "aggregates one update at a time; the others keep all updates of a round in memory"),
    "m": ("mixed_ranks", "each client may have its own rank (adapter.ranks)"),
    "p": ("personal", "each client ends with its own model"),
    "o": ("order_independent", "the order of the clients changes nothing"),
    "a": ("asynchronous", "no round waits for a client (docs/architecture.md)"),
    "c": ("cohorts", "clients may train several in one pass (docs/cohort.md)"),
}


def marks(properties: Properties) -> str:
    """Return one letter for each property that is true, and a dash for each that is false."""
    return "".join(letter if getattr(properties, name) else "-" for letter, (name, _) in MARKS.items())


#: Explains the columns of bytes, below a table.
LEGEND = (
    f"up, down: the tensors of one client's messages in a round of {REFERENCE}. An adapter is 9.8 MB there; names add "
    "0.3 % to a message with one. Computed from each algorithm's formula, which tests compare with real messages.",
    "server, client: what each keeps between rounds, in adapters, without a client's optimiser state.",
)


_HEAD = ("name", "travels", "up", "down", "server", "client", "marks", "PEFT", "arXiv")


_WIDTHS = (16, 26, 7, 7, 7, 6, 8, 4, 10)


def _line(cells: tuple[str, ...]) -> str:
    placed = (c.rjust(w) if 2 <= i <= 5 else c.ljust(w) for i, (c, w) in enumerate(zip(cells, _WIDTHS, strict=True)))
    return " ".join(placed).rstrip()


def table(found: list[Entry]) -> list[str]:
    """Return the lines of a table of at most 100 columns, with a heading over each family."""
    lines, family = [_line(_HEAD)], ""
    for e in found:
        if e.family != family:
            family = e.family
            lines += ["", family]
        bound = "≤" if e.about and e.about.at_most else ""
        methods = e.methods if len(e.methods) <= 4 else "some"
        about = (e.about.travels, e.about.arxiv) if e.about else ("?", "")
        lines.append(
            _line(
                (
                    e.name, about[0], bound + shown(e.bytes("up")), bound + shown(e.bytes("down")), e.adapters("server"),
                    e.adapters("client"), marks(e.properties), methods, about[1],
                )
            )
        )  # fmt: skip
    return lines


def legend() -> list[str]:
    """Return the lines that explain the columns and letters of `table`."""
    return [*wrapped(*LEGEND), *(f"{letter}  {meaning}" for letter, (_, meaning) in MARKS.items())]


def wrapped(*sentences: str, indent: str = "") -> list[str]:
    """Wrap sentences to lines of at most 100 columns."""
    return [line for text in sentences for line in textwrap.wrap(text, 99, subsequent_indent=indent)]


def page(found: Entry) -> list[str]:
    """Return the lines about one algorithm: its idea, what it declares, its options."""
    lines = [*wrapped(f"{found.name}: {found.idea}"), ""]
    lines += wrapped(*(f"{name:<19}{text}" for name, text in facts_of(found)), indent=" " * 19)
    rows = options_of(found.cls)
    lines += ["", "options, beside algorithm.name in a recipe:" if rows else "no options of its own"]
    lines += wrapped(*(f"  {name} ({default}): {text}" for name, default, text in rows), indent=" " * 4)
    return [*lines, "", *wrapped(LEGEND[0])]


def options_of(cls: type[Algorithm]) -> list[tuple[str, str, str]]:
    """Return an algorithm's own options: name, default as a recipe writes it, description."""
    rows = []
    for name, field in cls.Options.model_fields.items():
        default: Any = "required" if field.default is PydanticUndefined else field.default
        text = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        rows.append((name, text, field.description or ""))
    return rows


def facts_of(found: Entry) -> list[tuple[str, str]]:
    """Return (name, text) rows: what an algorithm is, what it declares, what it costs."""
    properties, said = found.properties, found.about
    rows = [("family", found.family)]
    if said is not None:
        at_most = "at most " if said.at_most else ""
        rows += [
            ("paper", f"{said.paper}  https://arxiv.org/abs/{said.arxiv}" if said.arxiv else "none"),
            ("travels", said.travels),
            ("up, down", f"{at_most}{shown(found.bytes('up'))} and {shown(found.bytes('down'))} a client and round"),
            ("server keeps", f"{found.adapters('server')} adapters between rounds"),
            ("client keeps", f"{found.adapters('client')} adapters between rounds"),
        ]
    rows.append(("PEFT methods", found.methods))
    for name, meaning in MARKS.values():
        rows.append((name.replace("_", " "), f"{'yes' if getattr(properties, name) else 'no'} ({meaning})"))
    if properties.neutral is not None:
        neutral = ", ".join(f"algorithm.{k}={v}" for k, v in properties.neutral.items()) or "its defaults"
        rows.append(("neutral", f"with {neutral} one client's run is plain training"))
    return rows
