"""What padding-free batches are worth: the same examples and optimiser steps, packed against padded, as `name=value` lines.

    python benchmarks/padding.py                         S, a Llama of 7.6M parameters: 10 CPU minutes
    python benchmarks/padding.py --model smollm2-135m --sequences 64
    python benchmarks/padding.py --sequences 64          a quick look

512 made-up sequences, lengths lognormal (median 120, σ 0.6, 32 to 512), the second half of each supervised, in random order.
Both ways call the trainer's own step, one after the other on the same examples in turning order, each with an adapter and an
optimiser of its own. The padded way is not handicapped: it makes logits for the columns that have a label only.

    speedup_batchB=         CPU seconds of the padded loop over those of the packed one, B examples a step
    padded_real_ratioB=     tokens with padding over tokens without, of the same batches
    padding_efficiency=     speed-up over that ratio, the least of the three: 1 is all that there is to win
    speedup_single8=        against each example alone in a pass, 8 passes accumulated into a step
    same_ratio=             packed against packed, 8 examples a step: what the method makes of no difference
    loss_difference=        largest difference of the two ways' mean losses
    adapter_difference=     of their adapters at the end, over the distance moved; the largest

LoRA of rank 8 on all linear layers, AdamW. One thread unless OMP_NUM_THREADS says otherwise. The exit code is 1 where
padding_efficiency is under 0.97 or a mean loss differs by more than 1e-3.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bare import Plain  # before torch: it sets what that reads when it is imported
from pairs import load, ratio
from small import small_model

from fedloom.data.batching import Batch, collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.loading import load_base
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.trainer import Stepper

SIZES, LEAST = (8, 4, 2), 0.97


def sequences(count: int, vocabulary: int) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(120), 0.6, count), 32, 512).astype(int)
    return [TokenSequence(rng.integers(3, vocabulary, n).astype(np.int32), int(n) // 2) for n in lengths]


class Way:
    """One way to train on the same examples: an adapter and an optimiser of its own on the common base."""

    def __init__(self, model: AdaptedModel, config: TrainConfig, packed: bool, together: bool = True) -> None:
        self.model, self.config, self.packed, self.together = model, config, packed, together
        self.flat = model.initial.clone()
        self.stepper = Stepper(model, Plain(), config)
        self.seconds: list[float] = []

    def batches(self, examples: Sequence[TokenSequence]) -> list[Batch]:
        passes = [examples] if self.together else [[e] for e in examples]
        return [collate(p, packed=self.packed, pad=3) for p in passes]

    def step(self, examples: Sequence[TokenSequence]) -> None:
        batches = self.batches(examples)
        self.model.adapter.copy_(self.flat)
        started = time.process_time()
        self.stepper.step(len(self.seconds), batches, self.config.lr)
        self.seconds.append(time.process_time() - started)
        self.flat.copy_(self.model.adapter.flat)


def trained(ways: Sequence[Way], data: Sequence[TokenSequence], size: int) -> None:
    """Every way over all of `data`, step by step in turning order. The first step is taken twice: it is slower."""
    groups = [data[at : at + size] for at in range(0, len(data) - size + 1, size)]
    ways[0].model.module.train()
    for number, group in enumerate([groups[0], *groups]):
        for way in ways if number % 2 else reversed(ways):
            way.step(group)
    for way in ways:
        del way.seconds[0]


def padded_over_real(data: Sequence[TokenSequence], size: int) -> float:
    groups = [[len(s) for s in data[at : at + size]] for at in range(0, len(data) - size + 1, size)]
    return sum(size * max(g) for g in groups) / sum(sum(g) for g in groups)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="S", help="S, or a model as in a recipe (smollm2-135m)")
    parser.add_argument("--sequences", type=int, default=512)
    arguments = parser.parse_args()
    print(f"model={arguments.model} {load()}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        name = str(small_model(Path(scratch) / "model")) if arguments.model == "S" else arguments.model
        model = attach(load_base(ModelConfig(name=name)), AdapterConfig(rank=8, alpha=16), seed=0)
    data = sequences(arguments.sequences, model.causal_lm.config.vocab_size)
    config = TrainConfig(steps=1, lr=1e-3)
    efficiencies, losses, gaps = [], [], []
    for size in SIZES:
        packed, padded = Way(model, config, packed=True), Way(model, config, packed=False)
        extra = [Way(model, config, True, together=False), Way(model, config, True)] if size == 8 else []
        trained([packed, padded, *extra], data, size)
        speedup, possible = sum(padded.seconds) / sum(packed.seconds), padded_over_real(data, size)
        efficiencies.append(speedup / possible)
        losses.append(abs(packed.stepper.finished().loss - padded.stepper.finished().loss))
        gaps.append(float((packed.flat - padded.flat).norm() / (packed.flat - model.initial).norm()))
        print(f"speedup_batch{size}={speedup:.3f}", f"padded_real_ratio{size}={possible:.3f}", sep="\n", flush=True)
        if extra:
            print(f"speedup_single8={sum(extra[0].seconds) / sum(packed.seconds):.3f}")
            print(f"same_ratio={ratio(extra[1].seconds, packed.seconds):.4f}", flush=True)
    print(f"padding_efficiency={min(efficiencies):.3f}")
    print(f"loss_difference={max(losses):.1e}", f"adapter_difference={max(gaps):.1e}", load(), sep="\n")
    missed = [] if min(efficiencies) >= LEAST else ["padding_efficiency"]
    missed += [] if max(losses) <= 1e-3 else ["loss_difference"]
    for missing in missed:
        print(f"missed: {missing}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
