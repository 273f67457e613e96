"""Suites of lm-eval tasks: their tasks, numbers of answered examples, and the metrics that make the evaluation score.

A suite is a YAML file beside this one:

    note: what the suite measures, as a phrase
    tasks:
      gsm8k: {metric: strict, shots: 5}      # lm-eval task → its metric for the evaluation score
    partial: false                           # whether tasks without data or toolchain are left out, with a warning

The evaluation score is the mean of the tasks' metrics. Suites that a run measures every round are in
evaluation/suites.py; `fedloom evaluate --suite` takes either. This file imports neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedloom.common.errors import UserError

HERE = Path(__file__).parent / "task_suites"


#: fedloom's task files: the `--include_path` of lm-eval's command line.
TASKS = HERE.parent / "tasks"


@dataclass(frozen=True)
class TaskMetric:
    """One task of a suite: the metric that counts, and the number of answered examples (None: the task's own)."""

    metric: str
    shots: int | None = None


@dataclass(frozen=True)
class TaskSuite:
    """Tasks that are measured together.

    Attributes:
        name: as in `--suite`.
        note: what the suite measures, as a phrase.
        tasks: lm-eval task → its metric and shots.
        partial: whether a task without data or toolchain is left out instead of an error.
        folder: of the task files.
    """

    name: str
    note: str
    tasks: Mapping[str, TaskMetric]
    partial: bool = False
    folder: Path = TASKS

    @classmethod
    def read(cls, path: Path, folder: Path | None = None) -> TaskSuite:
        """Read a suite's YAML file. `folder`: of the task files; fedloom's own by default. Raises UserError."""
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        try:
            tasks = {task: TaskMetric(**measured) for task, measured in values["tasks"].items()}
            return cls(path.stem, values["note"], tasks, values.get("partial", False), folder or TASKS)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a suite ({error}): write the keys note and tasks, and optionally partial"
            ) from None


GSM8K = TaskSuite.read(HERE / "gsm8k.yaml")


HUMANEVAL = TaskSuite.read(HERE / "humaneval.yaml")


HUMANEVAL_DRAWN = TaskSuite.read(HERE / "humaneval-drawn.yaml")


HUMANEVAL_X = TaskSuite.read(HERE / "humaneval-x.yaml")


HUMANEVAL_X_DRAWN = TaskSuite.read(HERE / "humaneval-x-drawn.yaml")


MMLU = TaskSuite.read(HERE / "mmlu.yaml")


MEDMCQA = TaskSuite.read(HERE / "medmcqa.yaml")


HELM_MINI = TaskSuite.read(HERE / "helm-mini.yaml")
