"""Evaluate the live model, adapter included, with lm-eval. The only file that imports lm_eval.

    model (live) ─ LiveModel: a subclass of HFLM ─┐
    suite ─ task files ─ lm-eval's tasks ─────────┴─ lm-eval's evaluate ─ metrics ─ evaluation score

Nothing is written, merged or loaded again, so the scored model is the trained one. Under LoRA and similar methods the
model's forward pass contains the adapter. It does not contain virtual tokens: this file puts them in front, as
models/virtual_tokens.py does, and shortens lm-eval's windows by their number. The metrics equal those of lm-eval's
command line with the same files; `command` returns that line. This file does not know data sets, prompts or metrics
(documents.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from transformers import GenerationConfig

from fedloom.common.errors import UserError
from fedloom.data.corpus import Example
from fedloom.data.prompts import Template
from fedloom.evaluation.public.suites import TaskSuite
from fedloom.models import virtual_tokens as virtual
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attention import packed as attention
from fedloom.models.forward import plain_attention

if TYPE_CHECKING:
    from fedloom.evaluation.public.documents import Docs

log = logging.getLogger(__name__)

try:
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise UserError(
        f'{error.name} is not installed, and this suite is scored by lm-eval: pip install "fedloom[evaluation]"'
    ) from None


#: The seed that lm-eval's command line gives torch. Drawn answers follow from it.
SEED = 1234


class LiveModel(HFLM):
    """lm-eval's model class around a live AdaptedModel. Only models with virtual tokens need code of its own.

    Args:
        specials: whether the tokenizer adds its special tokens to a prompt; None uses the tokenizer's default.
    """

    def __init__(self, model: AdaptedModel, batch_size: int, specials: bool | None) -> None:
        super().__init__(
            pretrained=model.causal_lm, tokenizer=model.tokenizer, batch_size=batch_size, add_bos_token=specials
        )
        self._adapted = model
        if model.virtual_tokens:
            self._max_length = self.max_length - model.virtual_tokens

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return logits [rows, L, vocabulary]. Rows are padded on the right, which no earlier position attends to."""
        model, v = self._adapted, self._adapted.virtual_tokens
        if not v:
            logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
            return logits
        with torch.no_grad():
            prompt = model.module.get_prompt(batch_size=len(inps))
            if model.prefixed:
                seen = inps.new_ones(len(inps), v + inps.shape[1])
                output = model.causal_lm(input_ids=inps, attention_mask=seen, past_key_values=prompt)
            else:
                words = model.module.word_embeddings(inps)
                inputs = torch.cat([prompt.to(words.dtype), words], dim=1)
                output = model.causal_lm(inputs_embeds=inputs, use_cache=False)
        all_logits: torch.Tensor = output.logits
        return all_logits[:, -inps.shape[1] :]  # the virtual tokens' logits are in front

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **how: Any) -> torch.Tensor:
        """Return the question followed by the answer: [rows, L + new]."""
        model, (rows, width) = self._adapted, context.shape
        if not model.virtual_tokens:
            output: torch.Tensor = super()._model_generate(context, max_length, stop, **how)
            return output
        mask = how.pop("attention_mask")
        drawn = bool(how.pop("do_sample", False))
        config = GenerationConfig(
            max_new_tokens=max_length - width,
            do_sample=drawn,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **(how if drawn else {}),
        )
        criteria = stop_sequences_criteria(self.tokenizer, stop, virtual.answer_starts(model, width), rows)
        answer = virtual.generate(model, context, mask, config, stopping_criteria=criteria)
        return torch.cat([context, answer], dim=1)


class TaskScores(TypedDict):
    """One task's numbers.

    `metrics` and `stderr` have lm-eval's own, by its names, and `metric` is the one that `score` is. `categories` has
    [score, questions] of each category where there are several.
    """

    score: float
    metric: str
    metrics: dict[str, float]
    stderr: dict[str, float]
    questions: int
    shots: int
    source: str
    categories: dict[str, list[float]]


class SuiteScores(TypedDict):
    """A suite's numbers: `score` is the mean over `tasks`; `left_out` says why a task was not measured."""

    score: float
    complete: bool
    left_out: dict[str, str]
    tasks: dict[str, TaskScores]


def score(
    model: AdaptedModel,
    suite: TaskSuite,
    template: Template,
    *,
    batch_size: int,
    limit: int | None,
    shots: int | None,
    allow_unsafe: bool,
) -> SuiteScores:
    """Measure the live model.

    Args:
        limit: take only the first `limit` questions of each task; None takes all.
        shots: answered examples in front of each question; None takes the suite's own numbers.

    Raises:
        UserError: a task's data, sandbox or toolchain is missing (for a partial suite: those of every task), or the
            suite names a task that its folder has no file for.
    """
    missing = sorted(set(suite.tasks) - set(_manager(suite, {}).all_tasks))
    if missing:
        raise UserError(
            f"the suite {suite.name} names the task {missing[0]}, and {suite.folder} has no file of it: add the file, or "
            "remove the task from the suite"
        )
    specials = False if template.style == "chat" else None
    tasks: dict[str, TaskScores] = {}
    left_out: dict[str, str] = {}
    with _quiet(), tempfile.TemporaryDirectory(prefix="fedloom-tokenizer-") as folder:
        model.tokenizer.save_pretrained(folder)
        model.causal_lm.config.save_pretrained(folder)
        lm = LiveModel(model, batch_size, specials)
        _check_prompts(lm, template)
        for name, measured in suite.tasks.items():
            wanted = measured.shots if shots is None else shots
            metadata = {"tokenizer": folder, "template": template.style, "system": template.system, "shots": wanted}
            try:
                loaded = _load_task(suite, name, {**metadata, "allow_unsafe": allow_unsafe})
            except UserError as error:
                if not suite.partial:
                    raise
                left_out[name] = str(error)
                log.warning(f"left out: {name}: {error}")
                continue
            (task,) = loaded["tasks"].values()
            docs: Docs = task.dataset["test"]
            asked = len(docs) if limit is None else min(limit, len(docs))
            log.info(f"{name}: {asked:,} questions from {docs.source}")
            if docs.shots < (wanted or 0):
                log.warning(
                    f"{name}: {wanted} answered examples were asked for, and that source has {docs.shots} to show"
                )
            with attention.use_attention(model.causal_lm, plain_attention(model)), torch.random.fork_rng():
                torch.manual_seed(SEED)
                found = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=True)
            tasks[name] = _task(found, name, measured.metric, docs)
    if not tasks:
        raise UserError(f"no task of the suite {suite.name} can be measured here: {'; '.join(left_out.values())}")
    return {
        "score": sum(t["score"] for t in tasks.values()) / len(tasks),
        "complete": not left_out,
        "left_out": left_out,
        "tasks": tasks,
    }


def _load_task(suite: TaskSuite, name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Load one task through lm-eval, with the metadata that its file reads.

    Raises:
        UserError: its data, a sandbox or a toolchain is missing.
    """
    loaded: dict[str, Any] = _manager(suite, metadata).load([name])
    return loaded


def _manager(suite: TaskSuite, metadata: Mapping[str, Any]) -> TaskManager:
    return TaskManager(include_path=str(suite.folder), include_defaults=False, metadata=dict(metadata))


def _task(found: Mapping[str, Any], name: str, metric: str, docs: Docs) -> TaskScores:
    """Return one task's metrics from lm-eval's results, whose keys are `metric,filter`."""
    numbers = {k.partition(",")[0]: v for k, v in found["results"][name].items() if "," in k}
    errors = {k.removesuffix("_stderr"): v for k, v in numbers.items() if k.endswith("_stderr")}
    metrics = {k: v for k, v in numbers.items() if not k.endswith("_stderr")}
    samples = found["samples"][name]
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample["doc"]["category"], []).append(float(sample[metric]))
    return {
        "score": metrics[metric],
        "metric": metric,
        "metrics": metrics,
        "stderr": {k: v for k, v in errors.items() if isinstance(v, float)},
        "questions": len(samples),
        "shots": docs.shots,
        "source": docs.source,
        "categories": {k: [sum(v) / len(v), len(v)] for k, v in sorted(groups.items())} if len(groups) > 1 else {},
    }


def _check_prompts(lm: LM, template: Template) -> None:
    """Raise UserError where lm-eval would turn a prompt into other tokens than training did."""
    example = Example("a", "b", "c")
    ours, theirs = template.prompt_ids(example), lm.tok_encode(template.prompt_text(example))
    if ours != theirs:
        raise UserError(
            f"lm-eval turns this model's {template.style} prompts into other tokens than training did ({theirs[-3:]} at the "
            f"end, not {ours[-3:]}): choose another data.template"
        )


def command(
    model: str, suite: TaskSuite, template: Template, batch_size: int, limit: int | None, shots: int | None = None
) -> list[list[str]]:
    """Return lm-eval's command lines that measure the model in a folder on a suite: one for each number of shots."""
    by_shots: dict[int | None, list[str]] = {}
    for name, measured in suite.tasks.items():
        by_shots.setdefault(measured.shots if shots is None else shots, []).append(name)
    arguments = [f"pretrained={model}", "dtype=float32"]
    if template.style == "chat":
        arguments.append("add_bos_token=False")
    lines = []
    for count, names in by_shots.items():
        values = {"template": template.style, "system": template.system, "shots": count}
        metadata = json.dumps({k: v for k, v in values.items() if v is not None})
        line = [
            "-m",
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--model_args",
            ",".join(arguments),
            "--tasks",
            ",".join(names),
        ]
        line += ["--include_path", str(suite.folder), "--batch_size", str(batch_size), "--metadata", metadata]
        lines.append([*line, *(["--limit", str(limit)] if limit is not None else [])])
    return lines


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's own log lines, and stop the tokenizer's threads. fedloom logs what its users need."""
    logger = logging.getLogger("lm_eval")
    before, parallel = logger.level, os.environ.get("TOKENIZERS_PARALLELISM")
    logger.setLevel(logging.ERROR)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        logger.setLevel(before)
        if parallel is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
