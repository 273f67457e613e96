"""A few test questions with the model's answers before and after training (answers.json)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from fedloom.data.corpus import Example
from fedloom.data.federated import FederatedData
from fedloom.data.prompts import Template
from fedloom.evaluation.score import generate
from fedloom.evaluation.suites import Suite
from fedloom.models.adapters import AdaptedModel

#: Tokens of the longest answer, where no suite sets a limit.
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """One question. `client` is its owner, or empty where the question is from the corpus's own test set."""

    client: str
    example: Example


def pick_samples(data: FederatedData, count: int) -> list[Sample]:
    """Pick `count` questions: from the corpus's own test set where it has one, else one from each client in turn."""
    if data.server_questions:
        return [Sample("", e) for e in data.server_questions[:count]]
    if not count:
        return []
    queues = []
    for client in data.measured:
        own = data.client(client)
        queues.append([Sample(client, e) for e in own.questions or [data.corpus.examples[i] for i in own.test]])
    picked: list[Sample] = []
    turn = 0
    while len(picked) < count and any(turn < len(q) for q in queues):
        picked += [q[turn] for q in queues if turn < len(q)]
        turn += 1
    return picked[:count]


class Answer(TypedDict):
    """One question with the answers before and after training. None where it was not asked, or nothing marks it."""

    client: str
    category: str
    prompt: str
    expected: str
    before: str
    after: str | None
    right_before: bool | None
    right_after: bool | None


class Answers(TypedDict):
    """The content of answers.json."""

    suite: str | None
    answers: list[Answer]


@dataclass(frozen=True)
class AnswerRecorder:
    """Record the model's answers to the samples, with the limits of the paired evaluation."""

    template: Template
    suite: Suite | None
    batch_size: int
    max_length: int
    max_new_tokens: int | None

    def record_before(self, samples: list[Sample], model: AdaptedModel) -> Answers:
        """Return the content of answers.json with the answers before training."""
        texts = self._generate(samples, model)
        return {
            "suite": self.suite.name if self.suite else None,
            "answers": [
                {
                    "client": s.client,
                    "category": s.example.category,
                    "prompt": "\n\n".join(part for part in (s.example.instruction, s.example.input) if part),
                    "expected": s.example.output,
                    "before": text,
                    "after": None,
                    "right_before": self._right(s.example, text),
                    "right_after": None,
                }
                for s, text in zip(samples, texts, strict=True)
            ],
        }

    def record_after(
        self, stored: Answers, samples: list[Sample], model: AdaptedModel, load: Callable[[str], None]
    ) -> Answers:
        """Return `stored` with the answers after training. `load` puts a client's result into the live model."""
        answers: list[Answer] = []
        for sample, answer in zip(samples, stored["answers"], strict=False):
            load(sample.client)
            text = self._generate([sample], model)[0]
            answers.append({**answer, "after": text, "right_after": self._right(sample.example, text)})
        return {**stored, "answers": answers}

    def _generate(self, samples: list[Sample], model: AdaptedModel) -> list[str]:
        if not samples:
            return []
        own = self.suite.max_new_tokens if self.suite and self.suite.kind == "generate" else MAX_NEW_TOKENS
        return generate(
            model,
            self.template,
            [s.example for s in samples],
            batch_size=self.batch_size,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens or own,
        )

    def _right(self, example: Example, text: str) -> bool | None:
        return self.suite.right(example, text) if self.suite and self.suite.right else None
