"""Virtual tokens: what prompt tuning, P-tuning and prefix tuning put in front of every sequence.

A prompt is v embeddings [v, width] (Lester et al., arXiv 2104.08691; P-tuning computes them by a small network, Liu et
al., arXiv 2103.10385). A prefix is the keys and values of v positions in every layer (Li and Liang, arXiv 2101.00190).
peft stores and computes them; this file puts them into batches:

    packed   A prompt's embeddings start every segment, with positions from 0. A prefix's keys and
    values
             are visible to every segment's attention (models/attention/packed.py), whose positions start at v. One
             prompt
             serves the batch, so its gradients add up over the segments.
    answers  Virtual tokens come before left padding that nothing attends to, and positions do not count the padding.
    So
             an answer does not depend on the other questions in its batch. (peft's own generation counts the padding
             under prompt tuning.)

This file does not know what trains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig

from fedloom.data.batching import Batch
from fedloom.models.attention import packed as attention
from fedloom.models.loading import Base
from fedloom.recipe.adapter import AdapterConfig

if TYPE_CHECKING:
    from fedloom.models.adapters import AdaptedModel

#: Standard deviation of the keys and values of a prefix that starts at random.
PREFIX_SPREAD = 0.02


def with_virtual_tokens(model: AdaptedModel, batch: Batch, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the base model's forward takes for a packed batch with this model's virtual tokens in it.

    Args:
        inputs: what it takes without them.
    """
    v = model.virtual_tokens
    if model.prefixed:
        assert batch.positions is not None, "the batch is packed"
        states = [(layer.keys, layer.values) for layer in model.module.get_prompt(batch_size=1).layers]
        return {**inputs, "position_ids": batch.positions + v, "prefix_states": states}
    words = model.module.word_embeddings(batch.ids[0])  # [T, width]
    prompt = model.module.get_prompt(batch_size=1)[0].to(words.dtype)  # [v, width]
    segments = words.split(list(batch.lengths))
    lengths = tuple(n + v for n in batch.lengths)
    return {
        "inputs_embeds": torch.cat([part for segment in segments for part in (prompt, segment)])[None],
        "position_ids": torch.cat([torch.arange(n, device=words.device) for n in lengths])[None],
        "segment_lengths": lengths,
        "logits_to_keep": batch.where + v * (batch.owners + 1),
        "use_cache": inputs["use_cache"],
    }


def answer_starts(model: AdaptedModel, width: int) -> int:
    """Return how many ids come before the answer in generation's output, for questions of `width` ids.

    For a prompt of embeddings generation returns no ids of the question; for a prefix it returns ids for the prefix
    too.
    """
    if not model.virtual_tokens:
        return width
    return model.virtual_tokens + width if model.prefixed else 0


@torch.no_grad()
def generate(
    model: AdaptedModel, ids: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, **how: Any
) -> torch.Tensor:
    """Generate an answer to each row of left-padded ids [rows, L]: returns [rows, new], without the question.

    Args:
        ids: [rows, L], padded on the left.
        mask: [rows, L], 1 at real tokens.
        config: transformers' settings of generation.
        how: further arguments of transformers' `generate`, such as stopping criteria.
    """
    v, rows = model.virtual_tokens, len(ids)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if v:
        inputs["attention_mask"] = torch.cat([mask.new_ones(rows, v), mask], dim=1)
        prompt = model.module.get_prompt(batch_size=rows)
        if model.prefixed:  # a cache of v positions, for which generation needs ids too
            inputs["input_ids"] = torch.cat([ids.new_full((rows, v), config.pad_token_id or 0), ids], dim=1)
            inputs["past_key_values"] = prompt
        else:
            words = model.module.word_embeddings(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = torch.cat([prompt.to(words.dtype), words], dim=1)
    whole = model.causal_lm if v else model.module
    said: torch.Tensor = whole.generate(**inputs, generation_config=config, **how)
    return said[:, answer_starts(model, ids.shape[1]) :]


@torch.no_grad()
def initialise(module: Any, base: Base, config: AdapterConfig) -> None:
    """Initialise new virtual tokens in peft's `module` so that a model can learn from them.

    peft draws them from N(0, 1), which is noise to a model (loss 9.9 for a prefix where the base has 1.6). Here they
    start
    as tokens; a prefix starts as the base's own keys and values for tokens. Draws from torch's global generator. A
    prompt
    that a network computes keeps the network's own start.
    """
    if config.method not in {"prompt_tuning", "prefix_tuning"} or config.prefix_projection:
        return
    weight = module.prompt_encoder["default"].embedding.weight  # [v, width] or [v, layers · 2 · heads · d]
    if config.init == "random":
        spread = PREFIX_SPREAD if config.method == "prefix_tuning" else float(module.word_embeddings.weight.std())
        weight.normal_(0.0, spread)
        return
    ids = _first_tokens(base, config)
    if config.method == "prompt_tuning":
        weight.copy_(module.word_embeddings(ids))
        return
    cache = DynamicCache()  # without a configuration: a sliding window would keep only the last positions
    with attention.use_attention(base.model, attention.default_attention(base.model)):
        base.model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    states = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]  # each [heads, v, d]
    weight.copy_(torch.stack(states).permute(2, 0, 1, 3).reshape(weight.shape))


def _first_tokens(base: Base, config: AdapterConfig) -> torch.Tensor:
    """Return [v] ids: those of init_text, repeated, or drawn from the vocabulary without its special tokens."""
    v = config.virtual_tokens
    if config.init == "text":
        assert config.init_text is not None
        ids = torch.tensor(base.tokenizer(config.init_text, add_special_tokens=False)["input_ids"])
        ids = ids.repeat(-(-v // len(ids)))[:v]
    else:
        special = set(base.tokenizer.all_special_ids)
        ordinary = torch.tensor([i for i in range(len(base.tokenizer)) if i not in special])
        ids = ordinary[torch.randint(len(ordinary), (v,))]
    return ids.to(base.device)
