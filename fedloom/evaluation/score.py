"""Run the paired evaluation: batched greedy generation, or a choice by log-likelihood.

data/prompts.py writes the prompts, as in training. The suite decides which answers are right (suites.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig

from fedloom.data.corpus import Example
from fedloom.data.prompts import Template
from fedloom.data.tokenization import TokenSequence, fit, fit_prompt
from fedloom.evaluation.suites import Suite, choice_texts
from fedloom.models import virtual_tokens as virtual
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attention import packed as attention
from fedloom.models.forward import batch_by_length, plain_attention, token_losses


def score(
    model: AdaptedModel,
    template: Template,
    suite: Suite,
    questions: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    max_new_tokens: int | None = None,
    packed: bool = True,
) -> list[bool]:
    """Return for each question whether the live model's answer is right."""
    if suite.kind == "choice":
        picked = choose(model, template, questions, batch_size=batch_size, max_length=max_length, packed=packed)
        return [text == example.output for text, example in zip(picked, questions, strict=True)]
    assert suite.right is not None
    texts = generate(
        model,
        template,
        questions,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens or suite.max_new_tokens,
    )
    return [suite.right(example, text) for example, text in zip(questions, texts, strict=True)]


@torch.no_grad()
def generate(
    model: AdaptedModel,
    template: Template,
    questions: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    max_new_tokens: int,
) -> list[str]:
    """Generate greedy answers in the order of `questions`, without special tokens, stripped."""
    tokenizer = model.tokenizer
    prompts = [fit_prompt(template.prompt_ids(q), max_length) for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for row, i in enumerate(rows):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with attention.use_attention(model.causal_lm, plain_attention(model)):
            output = virtual.generate(model, ids.to(model.device), mask.to(model.device), config)
        for row, i in enumerate(rows):
            answers[i] = tokenizer.decode(output[row], skip_special_tokens=True).strip()
    return answers


@torch.no_grad()
def choose(
    model: AdaptedModel,
    template: Template,
    questions: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    packed: bool = True,
) -> list[str]:
    """Return for each question the choice with the highest log-likelihood, written as an answer in training."""
    sequences, owners = [], []
    for number, question in enumerate(questions):
        prompt = template.prompt_ids(question)
        for text in choice_texts(question):
            kept, answer, _ = fit(prompt, template.answer_ids(text), max_length)
            sequences.append(TokenSequence(np.asarray(kept + answer, dtype=np.int32), len(kept)))
            owners.append((number, text))
    pad = model.tokenizer.pad_token_id or 0
    likelihood = np.zeros(len(sequences))
    positions = list(range(len(sequences)))
    for batch in batch_by_length(sequences, batch_size, packed=packed, pad=pad, examples=positions):
        losses = token_losses(model, batch).cpu()
        sums = torch.zeros(len(batch.lengths)).index_add_(0, batch.owners.cpu(), losses)
        likelihood[list(batch.examples)] = -sums.numpy()
    best: dict[int, tuple[float, str]] = {}
    for value, (number, text) in zip(likelihood, owners, strict=True):
        if number not in best or value > best[number][0]:
            best[number] = (float(value), text)
    return [best[number][1] for number in range(len(questions))]
