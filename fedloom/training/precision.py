"""The precision that a client trains in: fp32, or matrix products in bf16 or fp16 by autocast; chosen by trying the device.

Weights that train, their gradient, the optimiser and the loss stay fp32. fp16 has few exponents, so small gradients would
be lost on their way back: the loss is multiplied by a power of two and the gradient divided by it (Micikevicius et al.,
"Mixed Precision Training", arXiv 1710.03740, section 3.2), under autocast and in a base whose weights are fp16. Where
that overflows the scale is halved and the step is computed again, so no step is lost and nothing has to be remembered
between rounds.

bf16 without instructions for it is many times slower than fp32, so the device is asked and not its name. No GPU has run
this file yet. It does not know what is trained.
"""

from __future__ import annotations

import logging
import math
import statistics
import time

import torch

log = logging.getLogger(__name__)

#: Where loss scaling begins in each round, as torch's GradScaler does.
FIRST_SCALE = 2.0**16


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A block whose matrix products run in `precision`."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def slowdown(device: torch.device, precision: str) -> float:
    """How many times longer products of a small layer take in `precision` than in fp32: medians of five, interleaved."""
    x, w = torch.ones(256, 512, device=device), torch.ones(1024, 512, device=device)

    def seconds(kind: str) -> float:
        started = time.perf_counter()
        with torch.no_grad(), autocast(device, kind):
            for _ in range(4):
                torch.nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds("fp32"), seconds(precision)  # the first of each is slower
    pairs = [(seconds("fp32"), seconds(precision)) for _ in range(5)]
    return statistics.median(b for _, b in pairs) / statistics.median(a for a, _ in pairs)


def choose_precision(wanted: str, device: torch.device) -> str:
    """fp32, bf16 or fp16. `auto` is bf16 where that is faster here, fp16 on a GPU without it, else fp32."""
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
    """1 where no gradient on its way is fp16.

    Args:
        dtype: of the base's weights: matrix products of fp32 training are in that, and fp16 ones as short of exponents as
            those of autocast. Under bf16 they are not.
    """

    def __init__(self, precision: str, dtype: torch.dtype = torch.float32) -> None:
        scaled = precision == "fp16" or (precision == "fp32" and dtype == torch.float16)
        self.value = self._fitting = FIRST_SCALE if scaled else 1.0

    def overflowed(self, gradient: torch.Tensor, loss: float) -> bool:
        """Divide the scale out of `gradient`; whether that failed and a smaller scale is to be tried.

        What no scale mends leaves it as it was before the step: a loss that is not finite, since a forward pass does not
        see the scale, and a gradient that is not finite without one.
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
