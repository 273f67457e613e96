"""What each operator of the trainer costs and saves, side by side in one run, as `name=value` lines.

    python benchmarks/operators.py              a Llama of 8 layers and 9M weights, vocabulary 16,384, LoRA r=8, packed
    python benchmarks/operators.py --model M    a model's folder or name, such as smollm2-135m

For each of checkpointing, loss_chunk and both, on a GPU also bf16 and fp16, against plain training of the same batches:

    NAME_time_ratio=      seconds of its forward and backward over plain's, medians of interleaved pairs
    NAME_kept_ratio=      bytes that its forward leaves for backward (weights not counted), over plain's
    NAME_loss_difference= |its loss − plain's|
    NAME_gradient_error=  ‖its gradient − plain's‖ / ‖plain's‖

On a CPU bf16 may take minutes, so its products alone are timed, as `train.precision: auto` does:

    bf16_product_ratio=   seconds of a layer's products over those in fp32

The exit code is 1 where checkpointing or loss_chunk changes a loss by more than 1e-5 or a gradient by more than 1e-5, or
keeps no less than plain training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

from fedloom.config import AdapterConfig, ModelConfig  # first: it sets what torch reads when it is imported

import numpy as np  # isort: skip
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.data.batching import Batch, collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel, attach
from fedloom.models.forward import token_losses
from fedloom.models.loading import Base, load_base
from fedloom.models.memory import sparing
from fedloom.training.precision import autocast, slowdown

#: Name → (checkpointing, loss_chunk, precision).
OPERATORS: dict[str, tuple[bool, int | None, str]] = {
    "checkpointing": (True, None, "fp32"), "loss_chunk": (False, 32, "fp32"), "both": (True, 32, "fp32"),
    "bf16": (False, None, "bf16"), "fp16": (False, None, "fp16"),
}  # fmt: skip
PLAIN = (False, None, "fp32")


def small() -> Base:
    """About 9M weights, of which the embeddings are nearly half."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 16_384}
    model = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, **shape)
    )
    return Base(model.requires_grad_(False).eval(), None, "")  # type: ignore[arg-type]


def once(
    model: AdaptedModel, batch: Batch, operator: tuple[bool, int | None, str]
) -> tuple[float, float, torch.Tensor, int]:
    """(seconds, loss, gradient, bytes kept) of one forward and backward."""
    recompute, chunk, precision = operator
    weights = {p.data_ptr() for p in model.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.grad.zero_()
    model.module.train()
    started = time.perf_counter()
    with ExitStack() as block:
        block.enter_context(sparing(model, recompute, chunk))
        with autocast(model.device, precision), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = token_losses(model, batch).mean()
        loss.backward()
    seconds = time.perf_counter() - started
    model.module.eval()
    return seconds, float(loss.detach()), model.grad.clone(), sum(kept.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    base = load_base(ModelConfig(name=given.model), say=lambda text: None) if given.model else small()
    model = attach(base, AdapterConfig(), 0)
    draw = np.random.default_rng(0)
    size = base.model.config.vocab_size
    lengths = np.clip(draw.lognormal(np.log(120), 0.6, 4), 32, 512).astype(int)
    batch = collate([TokenSequence(draw.integers(3, size, n).astype(np.int32), 1) for n in lengths], packed=True, pad=0)
    print(f"weights={sum(p.numel() for p in base.model.parameters())}", f"tokens={batch.tokens}", sep="\n")
    bad = False
    once(model, batch, PLAIN)
    for name, operator in OPERATORS.items():
        if model.device.type == "cpu" and operator[2] != "fp32":
            continue
        once(model, batch, operator)
        pairs = [(once(model, batch, PLAIN), once(model, batch, operator)) for _ in range(given.pairs)]
        plain, other = pairs[-1]
        ratio = statistics.median(b[0] for _, b in pairs) / statistics.median(a[0] for a, _ in pairs)
        loss, gradient = abs(other[1] - plain[1]), float((other[2] - plain[2]).norm() / plain[2].norm())
        print(f"{name}_time_ratio={ratio:.2f}", f"{name}_kept_ratio={other[3] / plain[3]:.3f}", sep="\n")
        print(f"{name}_loss_difference={loss:.1e}", f"{name}_gradient_error={gradient:.1e}", sep="\n", flush=True)
        exact = operator[2] == "fp32"
        bad |= exact and (loss > 1e-5 or gradient > 1e-5 or other[3] >= plain[3])
    print(f"bf16_product_ratio={slowdown(model.device, 'bf16'):.1f}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
