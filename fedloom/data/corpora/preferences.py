"""fed-preferences: the questions of fed-skills, each with its right answer and with a wrong one of the same form.

The wrong answer is the right answer of another question of the same skill, drawn from the recipe's seed; it always
differs from the right one. One skill per client; scored as fed-skills is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fedloom.common.randomness import numpy_generator
from fedloom.data.corpora import skills
from fedloom.data.files import Row
from fedloom.data.source import Request, Rows


def generate(request: Request) -> Rows:
    made = skills.generate(request)

    def rows() -> Iterator[Row]:
        by_skill: dict[str, list[Row]] = {}
        for row in made.train:
            by_skill.setdefault(row["skill"], []).append(row)
        for skill, listed in by_skill.items():
            rng = numpy_generator(request.seed, "corpus", 0, f"rejected/{skill}")
            for row in listed:
                other = row
                while other["answer"] == row["answer"]:  # ends: no answer belongs to more than half of the questions
                    other = listed[int(rng.integers(len(listed)))]
                yield {**row, "rejected": other["answer"]}

    return Rows(rows(), made.source)


SOURCE = replace(
    skills.SOURCE,
    name="fed-preferences",
    title="eight skills, each answer beside a wrong one",
    columns={**skills.SOURCE.columns, "rejected": "rejected"},
    load=generate,
)
