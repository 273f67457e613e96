"""Choose and apply the precision of training: fp32, or matrix products in bf16 or fp16 by autocast.

Trained weights, their gradient, the optimiser and the loss stay fp32. fp16 has a small exponent range, so small gradients
would become 0 in the backward pass. Therefore the loss is multiplied by a power of two, and the gradient is divided by it
(Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.2). This applies to autocast and to a base
whose weights are fp16. If the gradient overflows, the scale is halved and the step is computed again. So no step is lost,
and no state is kept between rounds.

bf16 without hardware instructions is many times slower than fp32, so `auto` times the device instead of reading its name.
Not tested on a GPU yet. This file does not know what is trained.
"""

from __future__ import annotations

import logging
import math
import statistics
import time

import torch

log = logging.getLogger(__name__)

#: The loss scale at the start of each round, as in torch's GradScaler.
FIRST_SCALE = 2.0**16


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which matrix products run in `precision`."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def slowdown(device: torch.device, precision: str) -> float:
    """Return a small layer's time in `precision` divided by its time in fp32: medians of five, interleaved."""
    x, w = torch.ones(256, 512, device=device), torch.ones(1024, 512, device=device)

    def seconds(kind: str) -> float:
        started = time.perf_counter()
        with torch.no_grad(), autocast(device, kind):
            for _ in range(4):
                torch.nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds("fp32"), seconds(precision)  # warm-up
    pairs = [(seconds("fp32"), seconds(precision)) for _ in range(5)]
    return statistics.median(b for _, b in pairs) / statistics.median(a for a, _ in pairs)


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16. `auto` is bf16 where that is faster here, fp16 on a GPU without bf16, else fp32."""
    if wanted == "fp32":
        return wanted
    if wanted == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if slowdown(device, "bf16") < 0.8 else "fp32"
    if device.type == "cpu" and (times := slowdown(device, wanted)) > 1.0:
        log.warning(
            f"train.precision={wanted} takes {times:.1f} times as long as fp32 on this machine: set train.precision=auto"
        )
    return wanted


class LossScale:
    """The loss scale of a round; 1 where no gradient is computed in fp16.

    Args:
        dtype: of the base's weights. Matrix products of fp32 training are in this dtype, so fp16 weights need a scale too.
            Under bf16 autocast they do not.
    """

    def __init__(self, precision: str, dtype: torch.dtype = torch.float32) -> None:
        scaled = precision == "fp16" or (precision == "fp32" and dtype == torch.float16)
        self.value = self._fitting = FIRST_SCALE if scaled else 1.0

    def overflowed(self, gradient: torch.Tensor, loss: float) -> bool:
        """Divide `gradient` by the scale. Returns whether the step must be computed again, with the scale halved.

        No scale fixes a loss that is not finite, because the forward pass does not use the scale, or a gradient that is
        not finite with scale 1. The scale then returns to its value before the step.
        """
        if self._fitting == 1.0:
            return False
        gradient.mul_(1.0 / self.value)  # a power of two: exact
        if not math.isfinite(loss):
            self.value = self._fitting
        elif bool(torch.isfinite(gradient).all()):
            self._fitting = self.value
        elif self.value > 1.0:
            self.value /= 2.0
            return True
        else:
            self.value = self._fitting
        return False
