"""Alignment: train the emulator's middle on public data to give the output of the full model's middle.

Both models share everything outside the middle, so the middle's input is the same. With h the hidden states at the end
of the full middle and ĥ the emulator's,

    loss = mean (h − ĥ)² / mean h²                       offsite-tuning, arXiv 2302.04870: mean squared error of h
         + λ · KL(full ‖ emulator) of the next token      FedBiOT, arXiv 2406.17706

With `layerwise` the first term is the mean over all layers that the emulator kept; each is compared with the same layer
of the full model. The division by the size of h and the form of the second term follow the code that FedBiOT's authors
publish; the equations in the papers could not be checked here. Dropout is off. Only the middle's latents
(compression.py) are trained; the adapter in the model is used as it is.

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
from fedloom.models.emulator.cut import Cut, emulate
from fedloom.models.forward import label_logits
from fedloom.models.layout import block_sum


@dataclass(frozen=True)
class Distillation:
    """Settings of an emulator's alignment.

    Attributes:
        lr: AdamW's learning rate, constant.
        kl: λ.
        layerwise: compare every kept layer, not only the last.
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
    """Train `latents` in place, one step per batch. Returns each step's loss, before the step.

    `model` is the full model with its adapter; it is not changed.
    """
    trained = [latents[n].requires_grad_(True) for n in sorted(latents)]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0, fused=True)
    losses = []
    try:
        for batch in batches:
            loss = emulator_loss(model, cut, compression.render(latents), batch, settings)
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
                parameter.grad = gradient  # None for an unused weight; no gradient of the adapter is computed
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
    """Compute the loss above, a scalar, with `weights` in the emulator's middle."""
    batch = batch.to(model.device)
    watched = cut.kept if settings.layerwise else cut.middle[-1:]
    with torch.no_grad(), _record_hidden_states(model, cut, watched) as wanted:
        teacher = label_logits(model, batch)
    with emulate(model.causal_lm, cut, weights), _record_hidden_states(model, cut, watched) as found:
        student = label_logits(model, batch)
    loss = torch.stack([relative_error(found[i], wanted[i], batch) for i in watched]).mean()
    if settings.kl:
        divergence = kl_div(
            student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="none", log_target=True
        )
        loss = loss + settings.kl * block_sum(divergence) / len(batch.labels)
    return loss


def relative_error(found: torch.Tensor, wanted: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Compute mean (h − ĥ)² / mean h² over real tokens. `found`, `wanted`: [N, L, width], or [1, T, width] packed."""
    if batch.mask is not None:
        real = batch.mask.bool()
        found, wanted = found[real], wanted[real]
    wanted = wanted.float()
    return block_sum((wanted - found.float()).square()) / block_sum(wanted.square())


@contextmanager
def _record_hidden_states(model: AdaptedModel, cut: Cut, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Yield a dict that collects layers' hidden states in this block's forward pass, by original index."""
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
