"""Check whether clients can train together on a model, and measure whether that is faster. Nothing is trained.

`refusal` checks the adapter, and then compares two seats of a cohort with the model alone, on two tiny sequences. A model
whose layers mix sequences (or route tokens, as experts do) gives other losses or gradients. `speedups` times the
recipe's own batches both ways. This file does not know recipes or clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from fedloom.data.batching import Batch, collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel
from fedloom.models.forward import token_losses
from fedloom.models.lowrank import A_END, B_END
from fedloom.training.cohort import Cohort, lora_layers

#: The largest relative difference of losses and gradients from a client alone. A model that mixes clients exceeds it by far.
TOLERANCE = 1e-3


#: Timings of one size, of which the shortest counts; there are fewer when they take more than PATIENCE seconds.
REPEATS, PATIENCE = 3, 2.0


def refusal(model: AdaptedModel) -> str:
    """Return why clients cannot train together on this model, as a clause of a message; empty where they can."""
    foreign = [n for n in model.adapter.layout.names if not n.endswith((A_END, B_END))]
    if foreign:
        return f"the adapter also trains {foreign[0]}, and a cohort knows LoRA on linear layers alone"
    head = model.causal_lm.get_output_embeddings()
    if any(found.module is head for found in lora_layers(model)):
        return "the adapter sits on the model's head, which sees supervised tokens only"
    return "" if _agrees(model) else "this model does not give clients in one pass what it gives each alone"


def _agrees(model: AdaptedModel) -> bool:
    """Return whether two seats with different adapters get the losses and gradients that each gets alone."""
    size = model.causal_lm.config.get_text_config().vocab_size
    rng, draw = np.random.default_rng(0), torch.Generator().manual_seed(0)
    batches = [
        collate([TokenSequence(rng.integers(3, size, n).astype(np.int32), 1)], packed=True, pad=3) for n in (9, 6)
    ]
    cohort, kept = Cohort(model, 2), model.adapter.flat.clone()
    found = []
    try:
        for seat, batch in zip(cohort.seats, batches, strict=True):
            noise = 0.02 * torch.randn(seat.adapter.flat.shape, generator=draw)
            model.adapter.copy_(kept + noise.to(kept.device))
            seat.adapter.copy_(model.adapter.flat)
            found.append((_pass(model, batch), model.grad.clone()))
        jobs = [partial(_pass, seat, batch) for seat, batch in zip(cohort.seats, batches, strict=True)]
        together = cohort.run(jobs)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # a layer with an unknown call signature
        return False
    finally:
        model.adapter.copy_(kept)
        model.grad.zero_()
    return all(
        abs(loss - alone) <= TOLERANCE * abs(alone)
        and float((seat.grad - grad).norm()) <= TOLERANCE * float(grad.norm())
        for loss, seat, (alone, grad) in zip(together, cohort.seats, found, strict=True)
    )


def _pass(model: AdaptedModel, batch: Batch) -> float:
    """Run forward and backward; returns the loss. The gradient is in `model.grad`."""
    model.grad.zero_()
    loss = token_losses(model, batch).mean()
    model.backward(loss)
    return float(loss.detach())


def speedups(model: AdaptedModel, batches: Sequence[Batch], sizes: Sequence[int]) -> dict[int, float]:
    """Measure for each cohort size: time of the clients' passes one by one / time of one common pass.

    Sizes are timed from the smallest, until one is slower than an earlier one. On a CPU this is CPU time, which other
    processes disturb less.

    Args:
        batches: one of each client.
    """
    found: dict[int, float] = {}
    _pass(model, batches[0])  # warm-up
    for size in sizes:
        cohort, chosen = Cohort(model, size), batches[:size]
        jobs = [partial(_pass, seat, batch) for seat, batch in zip(cohort.seats, chosen, strict=True)]
        alone, together = [], []
        for _ in range(REPEATS):
            alone.append(_timed(model, lambda: [_pass(model, batch) for batch in chosen]))  # noqa: B023
            together.append(_timed(model, lambda: cohort.run(jobs)))  # noqa: B023
            if sum(alone) + sum(together) > PATIENCE:
                break
        found[size] = min(alone) / min(together)
        if found[size] < max(found.values()):
            break
    model.grad.zero_()
    return found


def _timed(model: AdaptedModel, work: Callable[[], object]) -> float:
    clock = time.process_time
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        clock = time.perf_counter
    started = clock()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return clock() - started
