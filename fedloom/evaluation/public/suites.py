"""Suites of lm-eval tasks: which tasks, how many answered examples, and which of their numbers is the evaluation score.

A suite is a YAML file beside this one:

    note: what is measured, in one sentence
    tasks:
      gsm8k: {metric: strict, shots: 5}      # lm-eval task → its number for the evaluation score
    partial: false                           # whether tasks whose data or toolchain is not there are left out, and said so

The evaluation score is the mean of the tasks' numbers. What a run measures every round is another matter
(evaluation/suites.py); `fedloom evaluate --suite` takes either. This file imports neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedloom.common.errors import UserError

HERE = Path(__file__).parent / "task_suites"


#: Our own task files: what `--include_path` of lm-eval's command line is given.
TASKS = HERE.parent / "tasks"


@dataclass(frozen=True)
class Measured:
    """One task of a suite: the number of it that counts, and its answered examples (None: the task's own number)."""

    metric: str
    shots: int | None = None


@dataclass(frozen=True)
class TaskSuite:
    """Tasks that are measured together.

    Attributes:
        name: as in `--suite`.
        note: what is measured, in one sentence.
        tasks: lm-eval task → what of it counts.
        partial: whether a task whose data or toolchain is not there is left out, not refused.
        folder: where the task files lie.
    """

    name: str
    note: str
    tasks: Mapping[str, Measured]
    partial: bool = False
    folder: Path = TASKS

    @classmethod
    def read(cls, path: Path, folder: Path | None = None) -> TaskSuite:
        """A suite's YAML file. `folder`: of the task files; our own without. Raises UserError."""
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        try:
            tasks = {task: Measured(**measured) for task, measured in values["tasks"].items()}
            return cls(path.stem, values["note"], tasks, values.get("partial", False), folder or TASKS)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no suite ({error}): it holds note, tasks and perhaps partial") from None


GSM8K = TaskSuite.read(HERE / "gsm8k.yaml")


HUMANEVAL = TaskSuite.read(HERE / "humaneval.yaml")


HUMANEVAL_DRAWN = TaskSuite.read(HERE / "humaneval-drawn.yaml")


HUMANEVAL_X = TaskSuite.read(HERE / "humaneval-x.yaml")


HUMANEVAL_X_DRAWN = TaskSuite.read(HERE / "humaneval-x-drawn.yaml")


MMLU = TaskSuite.read(HERE / "mmlu.yaml")


MEDMCQA = TaskSuite.read(HERE / "medmcqa.yaml")


HELM_MINI = TaskSuite.read(HERE / "helm-mini.yaml")
