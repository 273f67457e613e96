"""Functions that fedloom's lm-eval task files call: questions with whole prompts, and metrics of answers.

lm-eval passes the model's arguments and `--metadata` to a task, so a task knows the tokenizer. data/prompts.py writes its
prompts, as in training (docs/adr/0007-evaluation-harness.md). A document is what lm-eval passes to templates: `prompt`,
`target`, `choices`, `gold`, and for code the `record`. This file does not import lm-eval.

Metadata keys:

    tokenizer, pretrained   the folder or hub id of the tokenizer that writes the prompts; the first one set is used
    template, system        as in a recipe's `data`; default: auto
    shots                   number of answered examples in front; default: the task's own number
    allow_unsafe            run programs without a sandbox where none works
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, overload

from fedloom.common import environment
from fedloom.common.errors import UserError
from fedloom.common.logs import heard_by
from fedloom.data.corpus import Example
from fedloom.data.prompts import Template
from fedloom.evaluation.public import datasets as benchmarks
from fedloom.evaluation.public import marking
from fedloom.evaluation.public.datasets import Questions
from fedloom.evaluation.sandbox.execution import find_sandbox, run_all
from fedloom.evaluation.sandbox.languages import check_runs, language, language_of, trim_answer
from fedloom.evaluation.sandbox.programs import Sandbox
from fedloom.models.loading import load_tokenizer
from fedloom.recipe.recipe import ModelConfig

Doc = dict[str, Any]


#: The columns of a document; lm-eval reads them as `features`.
COLUMNS = ("prompt", "target", "choices", "gold", "category", "answers", "record", "allow_unsafe")


class Docs(Sequence[Doc]):
    """A benchmark's documents, built on access: a limit of 50 costs 50 prompts.

    Attributes:
        source: where the questions came from.
        shots: the most answered examples in front of a question.
    """

    features = dict.fromkeys(COLUMNS)

    def __init__(self, questions: Questions, template: Template, shots: int, allow_unsafe: bool) -> None:
        self._questions = questions
        self._template = template
        self._allow_unsafe = allow_unsafe
        self.source = questions.source
        self.shots = min(shots, len(questions.shots(questions.asked[0], shots)))

    def __len__(self) -> int:
        return len(self._questions.asked)

    @overload
    def __getitem__(self, at: int) -> Doc: ...
    @overload
    def __getitem__(self, at: slice) -> list[Doc]: ...
    def __getitem__(self, at: int | slice) -> Doc | list[Doc]:
        if isinstance(at, slice):
            return [self._doc(question) for question in self._questions.asked[at]]
        return self._doc(self._questions.asked[at])

    def __iter__(self) -> Iterator[Doc]:
        return map(self._doc, self._questions.asked)

    def _doc(self, question: Example) -> Doc:
        reference = question.reference or {}
        record = reference.get("record")
        prompt = self._template.prompt_text(question, self._questions.shots(question, self.shots))
        return {
            "prompt": prompt + (record["prompt"] if record else ""),
            "target": question.output,
            "choices": list(question.choices),
            "gold": question.choices.index(question.output) if question.choices else -1,
            "category": question.category,
            "answers": reference.get("answers", [question.output]),
            "record": record,
            "allow_unsafe": self._allow_unsafe,
        }


def load(
    benchmark: str,
    shots_by_default: int = 0,
    *,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    template: str = "auto",
    system: str | None = None,
    shots: int | None = None,
    allow_unsafe: bool = False,
    **others: object,
) -> dict[str, Docs]:
    """Load a task's documents: lm-eval's `custom_dataset`, with one split, `test`. Other metadata is ignored.

    Raises:
        UserError: no source of the questions, no tokenizer, or for code no sandbox or no toolchain.
    """
    where = tokenizer or pretrained
    if where is None:
        raise UserError(
            "a task of fedloom needs the model's tokenizer, and none is given: add --model_args pretrained=FOLDER"
        )
    with heard_by(logging.getLogger("lm_eval").info):  # lm-eval's command line shows it; harness.py hides it
        questions = benchmarks.find(benchmark)
    records = [r for r in ((q.reference or {}).get("record") for q in questions.asked[:3]) if r]
    if records:  # a missing toolchain shows now, not after hours of generation
        language(language_of(records[0]["task_id"]))
        check_runs(_sandbox(allow_unsafe), records)
    chosen = Template.choose(_tokenizer(where), template, system)
    count = shots_by_default if shots is None else shots
    return {"test": Docs(questions, chosen, count, allow_unsafe)}


@cache
def _tokenizer(name: str) -> Any:
    return load_tokenizer(ModelConfig(name=name))


@cache
def _sandbox(allow_unsafe: bool) -> Sandbox:
    return find_sandbox(allow_unsafe=allow_unsafe)


# ------------------------------------------------------------------ metrics: a document and the model's answer → numbers


def mark_gsm8k(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return `strict`, by the number after the first ``####``, and `flexible`, by the last number anywhere."""
    right = marking.stated_number(doc["target"])
    return {
        "strict": float(marking.stated_number(results[0]) == right),
        "flexible": float(marking.last_number(results[0]) == right),
    }


def mark_short_answer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    answer = results[0].strip()
    return {"em": marking.exact_match(answer, doc["answers"]), "f1": marking.f1(answer, doc["answers"])}


def mark_summary(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {f"rouge{n}": marking.rouge(results[0], doc["target"], n) for n in (1, 2)}


# ------------------------------------------------------------------ programs


def run_programs(answers: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[bool]]:
    """Run every answer in a sandbox and return whether it passed its tests. This is lm-eval's filter for code.

    Args:
        answers: [questions][answers]
        docs: [questions]
    """
    answers, docs = [list(each) for each in answers], list(docs)
    programs = [
        language(language_of(doc["record"]["task_id"])).program(doc["record"], trim_answer(doc["record"], answer))
        for doc, texts in zip(docs, answers, strict=True)
        for answer in texts
    ]
    outcomes = run_all(_sandbox(bool(docs[0]["allow_unsafe"])), [program for program, _ in programs], _workers())
    passed = iter([judge(outcome) for (_, judge), outcome in zip(programs, outcomes, strict=True)])
    return [[next(passed) for _ in texts] for texts in answers]


def _workers() -> int:
    return int(os.environ.get("FEDLOOM_EVALUATION_WORKERS") or environment.available_cores())


def mark_programs(doc: Mapping[str, Any], results: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Return pass@1, and pass@10 where at least ten answers were drawn."""
    passed = results[0]
    sizes = [k for k in (1, 10) if k <= len(passed)]
    return {f"pass@{k}": marking.pass_at_k(len(passed), sum(passed), k) for k in sizes}
