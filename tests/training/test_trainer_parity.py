"""One client, one round equals a plain transformers + peft loop with padded batches (DESIGN.md 9b's tolerances).

The loop below uses the package for two things only: the seed of peft's start, and which examples are in which batch.
Text, tokens, padding, loss, schedule, clipping and optimiser are transformers', peft's and torch's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import fedloom
from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.common.randomness import derive_seed
from fedloom.data.batching import Plan, round_indices
from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch
from fedloom.messages.at_rest import load_tensors
from fedloom.models.layout import Adapter
from tests.helpers import tiny

ONE_CLIENT = {"split.splitter": "uniform", "split.num_clients": 1, "federation.rounds": 1}


@dataclass
class Trace:
    """What training went through: the loss of each step, the first gradient, start and end, all by name."""

    losses: list[float] = field(default_factory=list)
    gradient: dict[str, torch.Tensor] = field(default_factory=dict)
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    end: dict[str, torch.Tensor] = field(default_factory=dict)

    def flat(self, which: str) -> torch.Tensor:
        tensors = getattr(self, which)
        return torch.cat([tensors[n].flatten() for n in sorted(tensors)])


def named(model) -> dict[str, torch.Tensor]:
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}


def copies(tensors) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in tensors.items()}


def plain_loop(recipe: fedloom.Recipe, rows: list[dict[str, str]], steps: list[list[list[int]]]) -> Trace:
    """`rows` are the data file's; `steps` says which rows are in which forward pass of which step."""
    train, lora = recipe.train, recipe.adapter
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(recipe.seed, "init"))
        model = get_peft_model(model, config).train()
    parameters = named(model)
    trace = Trace(start=copies(parameters))
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, len(steps))
    for step in steps:
        encoded = [[encode(tokenizer, recipe.data.template, rows[i]) for i in passes] for passes in step]
        supervised = sum(len(ids) - prompt for passes in encoded for ids, prompt in passes)
        optimizer.zero_grad()
        total = 0.0
        for passes in encoded:
            longest = max(len(ids) for ids, _ in passes)
            ids, mask, labels = (torch.full((len(passes), longest), fill) for fill in (5, 0, -100))
            for row, (tokens, prompt) in enumerate(passes):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
                labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
            loss = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        if not trace.gradient:
            trace.gradient = copies({n: p.grad for n, p in parameters.items()})
        trace.losses.append(total)
        if train.clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), train.clip)
        optimizer.step()
        scheduler.step()
    trace.end = copies(parameters)
    return trace


def encode(tokenizer, template: str, row: dict[str, str]) -> tuple[list[int], int]:
    """(ids, length of the prompt), written out by hand."""
    asked = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
    if template == "chat":
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False
        )
    else:
        prompt = tokenizer(f"{asked}\n")["input_ids"]
    answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + answer, len(prompt)


def fedlooms(recipe: fedloom.Recipe, out: Path, monkeypatch) -> Trace:
    """The same through the whole package: `fedloom.run`, watched from the places where an algorithm may act."""
    trace, total = Trace(), []
    local_loss = FedAvg.local_loss

    def watched_loss(self, model, batch, step_tokens):
        if not trace.start:
            trace.start = copies(model.adapter.views)
        loss = local_loss(self, model, batch, step_tokens)
        total.append(loss.item())
        return loss

    def before_step(self, model):
        if not trace.gradient:
            trace.gradient = copies(model.adapter.layout.views(model.grad))
        trace.losses.append(sum(total))
        total.clear()

    monkeypatch.setattr(FedAvg, "local_loss", watched_loss)
    monkeypatch.setattr(FedAvg, "before_step", before_step)
    result = fedloom.run(recipe, out=out)
    trace.end = load_tensors(result.folder / "adapter" / "adapter_model.safetensors")
    assert Adapter.of(trace.end).sha256() == result.summary["adapter_sha256"]
    return trace


def both(recipe: fedloom.Recipe, tmp_path: Path, monkeypatch) -> tuple[Trace, Trace]:
    setting = prepare(recipe, Watch())
    (client,) = setting.data.partition.training_clients
    plan = Plan(recipe.train.batch_size, recipe.train.accumulation, steps=recipe.train.steps)
    steps = list(round_indices(setting.data.client(client).train, plan, 1, recipe.seed, client))
    rows = [json.loads(line) for line in Path(recipe.data.path).read_text().splitlines()]
    ours = fedlooms(recipe, tmp_path / "run", monkeypatch)
    return ours, plain_loop(recipe, rows, steps)


def agree(ours: Trace, theirs: Trace, recipe: fedloom.Recipe) -> None:
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5, rel=0)
    assert len(ours.losses) == recipe.train.steps
    assert sorted(ours.end) == sorted(theirs.end)
    assert torch.equal(ours.flat("start"), theirs.flat("start"))
    gradients = ours.flat("gradient"), theirs.flat("gradient")
    assert float((gradients[0] - gradients[1]).norm()) <= 1e-5 * float(gradients[1].norm())
    moved = theirs.flat("end") - theirs.flat("start")
    apart = ours.flat("end") - theirs.flat("end")
    assert float(moved.abs().max()) > 1e-3
    if recipe.train.eps >= 1e-4:
        assert float(apart.abs().max()) <= 1e-5
    else:  # Adam amplifies rounding where gradients are next to nothing
        assert float(apart.norm()) <= 1e-3 * float(moved.norm())


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("eps", [1e-4, 1e-8], ids=["eps", "as shipped"])
def test_one_client_one_round_equals_a_plain_loop(tiny_recipe, tmp_path, monkeypatch, eps, packing):
    train = {"steps": 10, "batch_size": 3, "accumulation": 2, "lr": 2e-2, "clip": 0.4, "weight_decay": 0.01}
    values = {**train, "eps": eps, "packing": packing, "schedule": "cosine"}
    recipe = tiny_recipe(ONE_CLIENT, **{f"train.{k}": v for k, v in values.items()})
    ours, theirs = both(recipe, tmp_path, monkeypatch)
    assert float(theirs.flat("gradient").norm()) > 0.4  # so that clipping does something
    agree(ours, theirs, recipe)


def test_the_real_model_equals_a_plain_loop(smollm2, tiny_recipe, tmp_path, monkeypatch):
    data = tiny.write_rows(tmp_path / "rows.jsonl", 12)
    train = {"steps": 3, "batch_size": 2, "accumulation": 2, "lr": 1e-3, "eps": 1e-4, "schedule": "cosine"}
    recipe = tiny_recipe(
        {**ONE_CLIENT, "model": str(smollm2), "data.path": str(data), "data.template": "chat", "adapter.rank": 4},
        **{f"train.{k}": v for k, v in train.items()},
    )
    ours, theirs = both(recipe, tmp_path, monkeypatch)
    agree(ours, theirs, recipe)
    assert theirs.losses[-1] < theirs.losses[0]
