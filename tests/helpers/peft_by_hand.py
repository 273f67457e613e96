"""Every PEFT method as the package makes it and as peft makes it by hand, with the same weights.

The references share nothing with the package but the weights: they configure peft themselves, pad on the right, take
all logits and shift labels themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import get_peft_model

from fedloom.data.batching import Batch, collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig
from tests.helpers import tiny

V = 5
WIDTH = 32
SMALL = {"vocab_size": 300, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
ARCHITECTURES = {
    "llama": ("LlamaConfig", {"intermediate_size": 64, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "qwen2": ("Qwen2Config", {"intermediate_size": 64, "num_key_value_heads": 2}),
}

#: Variant → the recipe's keys.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2, "alpha": 4},
    "rslora": {"method": "lora", "rank": 4, "alpha": 4, "rslora": True},
    "dora": {"method": "lora", "rank": 2, "alpha": 4, "dora": True},
    "bias": {"method": "lora", "rank": 2, "alpha": 4, "bias": "all"},
    "bias-lora-only": {"method": "lora", "rank": 2, "alpha": 4, "bias": "lora_only"},
    "adalora": {"method": "adalora", "rank": 2, "alpha": 4},
    "ia3": {"method": "ia3"},
    "prompt_tuning": {"method": "prompt_tuning", "virtual_tokens": V},
    "p_tuning": {"method": "p_tuning", "virtual_tokens": V, "encoder_hidden_size": 24},
    "prefix_tuning": {"method": "prefix_tuning", "virtual_tokens": V},
    "prefix_projection": {"method": "prefix_tuning", "virtual_tokens": V, "prefix_projection": True},
    "full": {"method": "full"},
}
#: The same, said to peft by hand.
BY_HAND: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=4, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "dora": lambda: peft.LoraConfig(
        r=2, lora_alpha=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "bias": lambda: peft.LoraConfig(r=2, lora_alpha=4, bias="all", target_modules="all-linear", task_type="CAUSAL_LM"),
    "bias-lora-only": lambda: peft.LoraConfig(
        r=2, lora_alpha=4, bias="lora_only", target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=2, target_r=2, lora_alpha=4, total_step=1, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=V, task_type="CAUSAL_LM"),
    "p_tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=V, encoder_hidden_size=24, task_type="CAUSAL_LM"),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=V, task_type="CAUSAL_LM"),
    "prefix_projection": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=V, prefix_projection=True, encoder_hidden_size=WIDTH, task_type="CAUSAL_LM"
    ),
}
VIRTUAL = ("prompt_tuning", "p_tuning", "prefix_tuning", "prefix_projection")
LENGTHS = ((5, 2), (30, 7), (17, 16), (2, 0))


def base_model(architecture: str = "llama", **more: Any) -> Any:
    name, own = ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, name)(**{**SMALL, **TOKENS, **own, **more})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():  # biases that do something
        for n, p in model.named_parameters():
            if n.endswith(".bias"):
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    return model.eval().requires_grad_(False)


def attached(variant: str, architecture: str = "llama", seed: int = 5, **more: Any) -> AdaptedModel:
    base = Base(base_model(architecture), tiny.tokenizer(), "")
    return attach(base, AdapterConfig(**{**VARIANTS[variant], **more}), seed)


def moved(model: AdaptedModel, seed: int = 7, by: float = 0.05) -> AdaptedModel:
    """Away from the start, where LoRA's B and AdaLoRA's E are zero and hide half of the gradient."""
    model.adapter.flat.add_(by * torch.randn(model.adapter.layout.numel, generator=torch.Generator().manual_seed(seed)))
    return model


def sequences() -> list[TokenSequence]:
    rng = np.random.default_rng(3)
    return [TokenSequence(rng.integers(3, 259, n).astype(np.int32), prompt) for n, prompt in LENGTHS]


def short(name: str) -> str:
    """peft's name of a parameter as the buffer has it."""
    name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    return name.replace(".default", "")


def plain_peft(variant: str, model: AdaptedModel, architecture: str) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """A model of peft's alone with the weights of `model`, and its trainable parameters by the buffer's names."""
    fresh = base_model(architecture)
    wrapped = fresh.requires_grad_(True) if variant == "full" else get_peft_model(fresh, BY_HAND[variant]())
    parameters = {short(n): p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert set(parameters) == set(model.adapter.layout.names)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(model.adapter.views[name])
    return wrapped.eval(), parameters


def padded_reference(wrapped: Any) -> torch.Tensor:
    """The losses of `sequences()` in order: right padding, all logits, labels shifted by hand."""
    seqs = sequences()
    longest = max(len(s) for s in seqs)
    ids, mask = torch.full((len(seqs), longest), 3), torch.zeros(len(seqs), longest, dtype=torch.long)
    for row, s in enumerate(seqs):
        ids[row, : len(s)] = torch.as_tensor(s.ids.astype(np.int64))
        mask[row, : len(s)] = 1
    logits = wrapped(input_ids=ids, attention_mask=mask).logits
    log_probabilities = logits[:, logits.shape[1] - longest :].log_softmax(-1)  # a prompt's own positions come first
    return torch.stack(
        [
            -log_probabilities[row, t - 1, ids[row, t]]
            for row, s in enumerate(seqs)
            for t in range(max(1, s.prompt), len(s))
        ]
    )


def together(packed: bool = True) -> Batch:
    return collate(sequences(), packed=packed, pad=3)
