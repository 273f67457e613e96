"""The trained model, adapter on, handed over to lm-eval in memory. The only file that imports lm_eval.

    model (live) ─ Handed: lm-eval's own HFLM around it ─┐
    suite ─ task files ─ lm-eval's tasks ────────────────┴─ lm-eval's evaluate ─ numbers ─ evaluation score

Nothing is written, merged or loaded again, so what is scored is what was trained. Under LoRA and its like the model's
own forward has the adapter in it. Virtual tokens are not in it: they are put in front here, as
models/virtual_tokens.py does it, and lm-eval's windows are shortened by their number. The numbers are those of
lm-eval's command line given the same files: `command` writes it down. This file does not know data sets, prompts or
marks (documents.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

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


#: The seed that lm-eval's command line gives torch, from which drawn answers follow.
SEED = 1234


class Handed(HFLM):
    """lm-eval's model class around a live AdaptedModel. For a model without virtual tokens all of it is lm-eval's own.

    Args:
        specials: whether the tokenizer adds its special tokens to a prompt; None leaves it to the tokenizer.
    """

    def __init__(self, model: AdaptedModel, batch_size: int, specials: bool | None) -> None:
        super().__init__(
            pretrained=model.causal_lm, tokenizer=model.tokenizer, batch_size=batch_size, add_bos_token=specials
        )
        self._adapted = model
        if model.virtual_tokens:
            self._max_length = self.max_length - model.virtual_tokens

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits [rows, L, vocabulary] of rows that are padded on the right, which no earlier position sees."""
        model, v = self._adapted, self._adapted.virtual_tokens
        if not v:
            logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
            return logits
        with torch.no_grad():
            prompt = model.module.get_prompt(batch_size=len(inps))
            if model.prefixed:
                seen = inps.new_ones(len(inps), v + inps.shape[1])
                said = model.causal_lm(input_ids=inps, attention_mask=seen, past_key_values=prompt)
            else:
                words = model.module.word_embeddings(inps)
                inputs = torch.cat([prompt.to(words.dtype), words], dim=1)
                said = model.causal_lm(inputs_embeds=inputs, use_cache=False)
        of_all: torch.Tensor = said.logits
        return of_all[:, -inps.shape[1] :]  # those of a prompt are in front

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **how: Any) -> torch.Tensor:
        """The question with the answer behind it: [rows, L + new]."""
        model, (rows, width) = self._adapted, context.shape
        if not model.virtual_tokens:
            said: torch.Tensor = super()._model_generate(context, max_length, stop, **how)
            return said
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
        said = virtual.generate(model, context, mask, config, stopping_criteria=criteria)
        return torch.cat([context, said], dim=1)


def score(
    model: AdaptedModel,
    suite: TaskSuite,
    template: Template,
    *,
    batch_size: int,
    limit: int | None,
    shots: int | None,
    allow_unsafe: bool,
) -> dict[str, Any]:
    """Measure the live model.

    Args:
        limit: the first so many questions of each task; None asks all.
        shots: answered examples in front of each question, in place of the suite's own numbers.

    Returns:
        {"score", "complete", "left_out": {task: why}, "tasks": {task: {"score", "metric", "metrics", "stderr",
        "questions", "shots", "source", "categories"}}}

    Raises:
        UserError: a task's data, a cage or a toolchain is not there; none of them has, where the suite may be partial;
            the suite names a task that its folder has no file of.
    """
    missing = sorted(set(suite.tasks) - set(_manager(suite, {}).all_tasks))
    if missing:
        raise UserError(f"the suite {suite.name} names the task {missing[0]}, and {suite.folder} has no file of it")
    specials = False if template.style == "chat" else None
    tasks: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    with _quiet(), tempfile.TemporaryDirectory(prefix="fedloom-tokenizer-") as folder:
        model.tokenizer.save_pretrained(folder)
        model.causal_lm.config.save_pretrained(folder)
        lm = Handed(model, batch_size, specials)
        _check_prompts(lm, template)
        for name, measured in suite.tasks.items():
            wanted = measured.shots if shots is None else shots
            told = {"tokenizer": folder, "template": template.style, "system": template.system, "shots": wanted}
            try:
                loaded = _loaded(suite, name, {**told, "allow_unsafe": allow_unsafe})
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
            with attention.using(model.causal_lm, plain_attention(model)), torch.random.fork_rng():
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


def _loaded(suite: TaskSuite, name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """One task as lm-eval loads it, with what its file asks to be told.

    Raises:
        UserError: its data, a cage or a toolchain is not there.
    """
    loaded: dict[str, Any] = _manager(suite, told).load([name])
    return loaded


def _manager(suite: TaskSuite, told: Mapping[str, Any]) -> TaskManager:
    return TaskManager(include_path=str(suite.folder), include_defaults=False, metadata=dict(told))


def _task(found: Mapping[str, Any], name: str, metric: str, docs: Docs) -> dict[str, Any]:
    """One task's numbers from lm-eval's results, whose keys are `metric,filter`."""
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
    """Refuse a tokenizer from whose prompts lm-eval would make other tokens than training did."""
    example = Example("a", "b", "c")
    ours, theirs = template.prompt_ids(example), lm.tok_encode(template.prompt_text(example))
    if ours != theirs:
        raise UserError(
            f"lm-eval reads this model's {template.style} prompts as other tokens than training did ({theirs[-3:]} at the "
            f"end, not {ours[-3:]}): choose another data.template"
        )


def command(
    model: str, suite: TaskSuite, template: Template, batch_size: int, limit: int | None, shots: int | None = None
) -> list[list[str]]:
    """lm-eval's own command lines that give a suite's numbers for the model in a folder, one for each number of shots."""
    by_shots: dict[int | None, list[str]] = {}
    for name, measured in suite.tasks.items():
        by_shots.setdefault(measured.shots if shots is None else shots, []).append(name)
    arguments = [f"pretrained={model}", "dtype=float32"]
    if template.style == "chat":
        arguments.append("add_bos_token=False")
    lines = []
    for count, names in by_shots.items():
        told = {"template": template.style, "system": template.system, "shots": count}
        metadata = json.dumps({k: v for k, v in told.items() if v is not None})
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
    """lm-eval says much that is not for our users; what matters is said by us. Its threads for tokens are not ours."""
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
