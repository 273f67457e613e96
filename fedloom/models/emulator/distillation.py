"""Alignment: the emulator's middle learns to give what the full model's middle gives, on public data.

Both models share everything outside of the middle, so the middle's input is the same. With h the hidden states that the
full middle ends with and ĥ the emulator's,

    loss = mean (h − ĥ)² / mean h²                       offsite-tuning, arXiv 2302.04870: mean squared error of h
         + λ · KL(full ‖ emulator) of the next token      FedBiOT, arXiv 2406.17706

With `layerwise` the first term is the mean over all layers that the emulator kept, each held to the same layer of the
full model. The division by the size of h and the form of the second term are those of the code that FedBiOT's authors
publish; the equations of the papers themselves could not be looked up here. Dropout is off. Only the middle's latents
(compression.py) move; the adapter that stands in the model is used as it is.

This file does not know where the data come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div

from fedloom.data.batching import Batch
from fedloom.models.adapters import AdaptedModel
from fedloom.models.emulator.compression import Compression
from fedloom.models.emulator.cut import Cut, emulating
from fedloom.models.forward import label_logits
from fedloom.models.layout import block_sum


@dataclass(frozen=True)
class Distillation:
    """How the emulator is aligned.

    Attributes:
        lr: AdamW's rate, constant.
        kl: λ.
        layerwise: hold every kept layer, not only the last.
        clip: largest norm of a step's gradient.
    """

    lr: float
    kl: float = 0.0
    layerwise: bool = False
    clip: float = 1.0


def align(
    model: AdaptedModel,
    cut: Cut,
    compression: Compression,
    latents: Mapping[str, torch.Tensor],
    batches: Iterable[Batch],
    settings: Distillation,
) -> list[float]:
    """Train `latents` in place, one step for each batch; returns the loss of each step, before it was taken.

    `model` is the full one with the adapter in it; it is left as it was.
    """
    trained = [latents[n].requires_grad_(True) for n in sorted(latents)]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0, fused=True)
    losses = []
    try:
        for batch in batches:
            loss = emulator_loss(model, cut, compression.render(latents), batch, settings)
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
                parameter.grad = gradient  # None where a weight took no part; the adapter's own gradient is not made
            torch.nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
            losses.append(float(loss.detach()))
    finally:
        for parameter in trained:
            parameter.grad = None
            parameter.requires_grad_(False)
    return losses


def emulator_loss(
    model: AdaptedModel, cut: Cut, weights: Mapping[str, torch.Tensor], batch: Batch, settings: Distillation
) -> torch.Tensor:
    """The loss above with `weights` in the emulator's middle: a scalar."""
    batch = batch.to(model.device)
    watched = cut.kept if settings.layerwise else cut.middle[-1:]
    with torch.no_grad(), _hidden_states(model, cut, watched) as wanted:
        teacher = label_logits(model, batch)
    with emulating(model.causal_lm, cut, weights), _hidden_states(model, cut, watched) as found:
        student = label_logits(model, batch)
    loss = torch.stack([relative_error(found[i], wanted[i], batch) for i in watched]).mean()
    if settings.kl:
        divergence = kl_div(
            student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="none", log_target=True
        )
        loss = loss + settings.kl * block_sum(divergence) / len(batch.labels)
    return loss


def relative_error(found: torch.Tensor, wanted: torch.Tensor, batch: Batch) -> torch.Tensor:
    """mean (h − ĥ)² / mean h² over real tokens. `found`, `wanted`: [N, L, width], or [1, T, width] packed."""
    if batch.mask is not None:
        real = batch.mask.bool()
        found, wanted = found[real], wanted[real]
    wanted = wanted.float()
    return block_sum((wanted - found.float()).square()) / block_sum(wanted.square())


@contextmanager
def _hidden_states(model: AdaptedModel, cut: Cut, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Original index of a layer → the hidden states that it gave in this block's forward pass."""
    seen: dict[int, torch.Tensor] = {}

    def watch(index: int) -> torch.utils.hooks.RemovableHandle:
        def hook(layer: torch.nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            seen[index] = output[0] if isinstance(output, tuple) else output

        layer: torch.nn.Module = model.causal_lm.get_submodule(f"{cut.path}.{index}")
        return layer.register_forward_hook(hook)

    handles = [watch(i) for i in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
