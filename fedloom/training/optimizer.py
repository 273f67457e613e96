"""The optimiser of one flat parameter, and the place of its state during training (`train.optimizer_offload`).

    null   beside the parameter
    cpu    the moments and a copy of a GPU's adapter are in the machine's memory: the gradient is copied there, and the new
           values are copied back (ZeRO-Offload; Ren et al., arXiv 2101.06840). Not tested on a GPU yet
    disk   the moments are in a file that is mapped into memory; the system writes and reads its pages as it needs memory
           (ZeRO-Infinity; Rajbhandari et al., arXiv 2104.07857)

Between rounds, a state that is kept is always on disk with the client. This file does not know steps or schedules.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from fedloom.common import cache_folder
from fedloom.recipe.recipe import TrainConfig


class FlatOptimizer:
    """Steps `parameter` by its gradient.

    Args:
        state: from an earlier optimiser's `tensors`, to continue from it.
    """

    def __init__(
        self, config: TrainConfig, parameter: torch.nn.Parameter, state: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._config, self._live, self._own = config, parameter, parameter
        if config.optimizer_offload and _has_memory_of_its_own(parameter.device):
            self._own = torch.nn.Parameter(parameter.detach().to("cpu", copy=True))
            self._own.grad = torch.zeros_like(self._own)
        self._optimizer = _made(config, self._own)
        if config.optimizer_offload == "disk":
            self._optimizer.state[self._own] = _mapped_state(config, self._own.numel())
        for name, tensor in (state or {}).items():
            self._load(name, tensor)

    def step(self, rate: float) -> None:
        """Take one step with the learning rate `rate`."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._own is self._live:
            self._optimizer.step()
            return
        with torch.no_grad():  # an algorithm may have changed the parameter since the last step
            self._own.copy_(self._live)
            self._own.grad.copy_(self._live.grad)  # type: ignore[union-attr, arg-type]
        self._optimizer.step()
        with torch.no_grad():
            self._live.copy_(self._own)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of the state (step, moments) on the CPU; empty where it is on disk and not kept."""
        if self._config.optimizer_offload == "disk" and self._config.optimizer_state == "reset":
            return {}
        state = self._optimizer.state.get(self._own, {})
        return {n: t.detach().cpu().clone() for n, t in state.items() if isinstance(t, torch.Tensor)}

    def _load(self, name: str, tensor: torch.Tensor) -> None:
        state, device = self._optimizer.state[self._own], self._own.device
        if name in state:  # mapped: keep it in the file
            state[name].copy_(tensor)
        else:
            state[name] = tensor.to(device if tensor.numel() > 1 or device.type == "cuda" else "cpu").clone()


def _has_memory_of_its_own(device: torch.device) -> bool:
    return device.type != "cpu"


def _made(config: TrainConfig, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    """Build torch's fused optimiser: there is only one tensor to step."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            [parameter], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        [parameter], lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )


def _mapped_state(config: TrainConfig, numel: int) -> dict[str, torch.Tensor]:
    """Create in files the state that torch's optimiser creates at its first step."""
    if config.optimizer == "sgd":
        return {"momentum_buffer": _mapped(numel)}
    return {"step": torch.zeros(()), "exp_avg": _mapped(numel), "exp_avg_sq": _mapped(numel)}


def _mapped(numel: int) -> torch.Tensor:
    """Create zeros [numel], fp32, in an unlinked file: it is deleted with the tensor, however the process ends.

    Raises OSError where the disk is too full. Without this check, a write to the mapped file would kill the process.
    """
    folder = cache_folder.cache_home() / "offload"
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, 4 * numel)
        return torch.from_file(path, shared=True, size=numel, dtype=torch.float32)
    finally:
        os.close(handle)
        Path(path).unlink()
