"""Evaluation: loss, answers and scores of a model, and the rules that say whether an answer is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.evaluation.public.suites import TaskSuite as TaskSuite
    from fedloom.evaluation.suites import Suite as Suite

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "Suite": "fedloom.evaluation.suites",
        "TaskSuite": "fedloom.evaluation.public.suites",
    },
)
