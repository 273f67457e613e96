"""Clients trained together against clients trained one by one: the same jobs, CPU time of both, as `name=value` lines.

    python benchmarks/cohort.py                         S, a Llama of 7.1M parameters made from a configuration
    python benchmarks/cohort.py --model smollm2-135m    M (tens of minutes on two cores; --pairs 3 is shorter)

    speedup_kK_tT=      K clients' rounds one by one over the same in a cohort of K; T tokens in a client's batch, one
                        sequence of that length. Every part of a client's work counts: trainer, loss, clipping, optimiser
    unequal_k8_t32=     the same with lengths of 24 to 40: the loop over parts in the place of the batched product
    same_kK_tT=         one by one against one by one: what the method shows where nothing differs
    auto_kK_tT=         with K clients and train.cohort=auto, over one by one; 1 where the probe chose off
    largest_difference= between the adapters of both ways after a round, over the distance moved

LoRA of rank 8 on all linear layers, AdamW, 8 steps of 32 tokens in a round, 2 of 128, 1 of 512. Pairs are interleaved and
change their order; medians of
the pairs' ratios. One thread unless OMP_NUM_THREADS says otherwise. The exit code is 1 where speedup_k4_t32 < 1.6 or
speedup_k8_t32 < 1.9 on S, or an auto_ line is under 0.95.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import fedloom.federation.cohorts as settled  # first: it sets what torch reads when it is imported

import numpy as np  # isort: skip
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.data.batching import Batch, collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.loading import Base, load_base
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.cohort import Cohort
from fedloom.training.cohort_probe import speedups
from fedloom.training.objectives import unit_losses
from fedloom.training.trainer import fit

S: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS, SIZES = (32, 128, 512), (2, 4, 8, 16)

#: Tokens of a client's round, in whole steps.
ROUND = 256

WANTED = {"speedup_k4_t32": 1.6, "speedup_k8_t32": 1.9}


class Plain:
    """A client that minimises the loss of its tokens."""

    def local_loss(self, model: AdaptedModel, batch: Batch, step_units: int) -> torch.Tensor:
        return unit_losses(model, batch).sum() / step_units

    def before_step(self, model: AdaptedModel) -> None: ...

    def after_step(self, model: AdaptedModel) -> None: ...


def made(name: str) -> AdaptedModel:
    if name != "S":
        base = load_base(ModelConfig(name=name))
    else:
        torch.manual_seed(0)
        base = Base(LlamaForCausalLM(LlamaConfig(**S)).eval(), None, "made from a configuration")  # type: ignore[arg-type]
    return attach(base, AdapterConfig(), seed=0)


def batches_of(model: AdaptedModel, lengths: Sequence[int]) -> list[Batch]:
    """One sequence for each client, of made-up tokens."""
    rng = np.random.default_rng(1)
    size = model.causal_lm.config.vocab_size
    return [collate([TokenSequence(rng.integers(3, size, n).astype(np.int32), 1)], packed=True, pad=3) for n in lengths]


def train(model: AdaptedModel, batch: Batch, steps: int) -> torch.Tensor:
    """One client's round, from the same start as all others'."""
    model.adapter.copy_(model.initial)
    walk: Iterator[list[Batch]] = iter([[batch]] * steps)
    fit(model, Plain(), walk, TrainConfig(steps=steps), first_step=0, total_steps=steps)
    return model.adapter.flat.clone()


def cpu(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def ratio(one: Callable[[], object], other: Callable[[], object], pairs: int) -> float:
    """Median of time of `one` over time of `other`, in interleaved pairs that change their order."""
    one(), other()
    found = []
    for number in range(pairs):
        times = {}
        for work in (one, other) if number % 2 else (other, one):
            times[work] = cpu(work)
        found.append(times[one] / times[other])
    return statistics.median(found)


def compared(model: AdaptedModel, lengths: Sequence[int], steps: int, pairs: int) -> tuple[float, float]:
    """(speed-up of a cohort, largest difference of its adapters over the distance moved)."""
    batches, cohort = batches_of(model, lengths), Cohort(model, len(lengths))
    alone = lambda: [train(model, batch, steps) for batch in batches]  # noqa: E731
    together = lambda: cohort.run([partial(train, s, b, steps) for s, b in zip(cohort.seats, batches, strict=True)])  # noqa: E731
    gaps = [
        float((a - b).norm() / (a - model.initial).norm()) for a, b in zip(alone(), together(), strict=True)
    ]  # fmt: skip
    return ratio(alone, together, pairs), max(gaps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", default="S")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = made(arguments.model)
    found: dict[str, float] = {}

    def tell(name: str, value: float, digits: str = ".2f") -> None:
        found[name] = value
        print(f"{name}={value:{digits}}", flush=True)

    print(f"model={arguments.model}\nparameters={sum(p.numel() for p in model.causal_lm.parameters()):,}")
    print(f"load={os.getloadavg()[0]:.1f} threads={torch.get_num_threads()}")
    gaps = []
    for tokens in arguments.tokens:
        settings = max(1, ROUND // tokens), arguments.pairs
        for size in SIZES:
            speed, gap = compared(model, [tokens] * size, *settings)
            gaps.append(gap)
            tell(f"speedup_k{size}_t{tokens}", speed)
            chosen = probed(model, tokens, size)
            if chosen in (1, size):
                tell(f"auto_k{size}_t{tokens}", speed if chosen == size else 1.0)
            else:
                tell(f"auto_k{size}_t{tokens}", found[f"speedup_k{chosen}_t{tokens}"])
    if 32 in arguments.tokens:
        speed, gap = compared(model, [24, 40, 29, 35, 32, 26, 38, 31], ROUND // 32, arguments.pairs)
        tell("unequal_k8_t32", speed)
        batches = batches_of(model, [32] * 4)
        first, second = (partial(lambda b: [train(model, x, ROUND // 32) for x in b], batches) for _ in range(2))
        tell("same_k4_t32", ratio(first, second, arguments.pairs))
        gaps.append(gap)
    tell("largest_difference", max(gaps), ".1e")
    print(f"load={os.getloadavg()[0]:.1f}")
    missed = [n for n, least in WANTED.items() if arguments.model == "S" and found.get(n, least) < least]
    missed += [n for n, value in found.items() if n.startswith("auto_") and value < 0.95]
    for name in missed:
        print(f"missed: {name}", file=sys.stderr)
    return 1 if missed else 0


def probed(model: AdaptedModel, tokens: int, clients: int) -> int:
    """What train.cohort=auto chooses; 1 for off."""
    sizes = [size for size in settled.COHORTS if size <= clients]
    ratios = speedups(model, batches_of(model, [tokens] * clients), sizes)
    best = max(ratios, key=lambda size: ratios[size])
    return best if ratios[best] >= settled.WORTH_IT else 1


if __name__ == "__main__":
    sys.exit(main())
