"""All randomness comes from here: a generator for each (seed, purpose, round, client), never from global state.

The seed of a generator is the first 63 bits of sha256("seed/purpose/round/client"), so a client draws the same numbers
whatever the order, the runtime or the number of other clients. torch's global generator, which dropout and module
initialisation read, is forked and seeded for the length of one client-round.

What must stay unknown to everybody (noise that a guarantee rests on) comes from the operating system instead, and from
no seed: `secret_uniform` and `secret_normal`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

#: Every purpose that randomness is drawn for; a new one is added here.
Purpose = Literal[
    "corpus", "split", "sample", "batches", "init", "dropout", "noise", "quantise", "questions", "directions", "seeds",
    "arrival", "measured", "device", "available", "vanishing", "benchmark",
]  # fmt: skip


def derived_seed(seed: int, purpose: Purpose, round: int = 0, client: str = "") -> int:
    """The 63-bit seed for one purpose, round and client."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(seed: int, purpose: Purpose, round: int = 0, client: str = "") -> torch.Generator:
    """A CPU generator of torch."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, round, client))


def numpy_generator(seed: int, purpose: Purpose, round: int = 0, client: str = "") -> np.random.Generator:
    """A generator of numpy (PCG64)."""
    return np.random.Generator(np.random.PCG64(derived_seed(seed, purpose, round, client)))


@contextmanager
def forked_torch(seed: int, purpose: Purpose, round: int = 0, client: str = "") -> Iterator[None]:
    """Seed torch's global generators for this block and put them back afterwards."""
    number = derived_seed(seed, purpose, round, client)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(number)  # torch.manual_seed keeps a stack trace of each call without a GPU
        if devices:
            torch.cuda.manual_seed_all(number)
        yield


def secret_uniform(count: int) -> np.ndarray:
    """Numbers in (0, 1], [count] float64, 53 bits each from the operating system's entropy."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 1.0) * 2.0**-53


def secret_normal(count: int) -> torch.Tensor:
    """Standard normal numbers, [count] float64, from the operating system's entropy by Box and Muller's method."""
    half = (count + 1) // 2
    radius, angle = np.sqrt(-2.0 * np.log(secret_uniform(half))), 2.0 * np.pi * secret_uniform(half)
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count])
