"""Create all random generators: one per (seed, purpose, round, client), never from global state.

The seed of a generator is the first 63 bits of sha256("seed/purpose/round/client"). So a client draws the same numbers
in
every order, on every runtime and with any number of other clients. torch's global generator, which dropout and module
initialisation use, is forked and seeded for one client-round.

Noise that a privacy guarantee needs must be unknown to everybody. It comes from the operating system instead of a seed:
`secret_uniform` and `secret_normal`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

#: All purposes of random draws; add a new one here.
Purpose = Literal[
    "corpus", "split", "sample", "batches", "init", "dropout", "noise", "quantise", "questions", "directions", "seeds",
    "arrival", "measured", "device", "available", "vanishing", "benchmark",
]  # fmt: skip


def derive_seed(seed: int, purpose: Purpose, round: int = 0, client: str = "") -> int:
    """Return the 63-bit seed for one purpose, round and client."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(seed: int, purpose: Purpose, round: int = 0, client: str = "") -> torch.Generator:
    """Return a CPU generator of torch."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, round, client))


def numpy_generator(seed: int, purpose: Purpose, round: int = 0, client: str = "") -> np.random.Generator:
    """Return a generator of numpy (PCG64)."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, round, client)))


@contextmanager
def fork_torch(seed: int, purpose: Purpose, round: int = 0, client: str = "") -> Iterator[None]:
    """Seed torch's global generators for this block and put them back afterwards."""
    number = derive_seed(seed, purpose, round, client)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(number)  # torch.manual_seed keeps a stack trace of each call without a GPU
        if devices:
            torch.cuda.manual_seed_all(number)
        yield


def secret_uniform(count: int) -> np.ndarray:
    """Draw numbers in (0, 1], [count] float64, 53 bits each from the operating system's entropy."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 1.0) * 2.0**-53


def secret_normal(count: int) -> torch.Tensor:
    """Draw standard normal numbers, [count] float64, from the system's entropy, by Box and Muller's method."""
    half = (count + 1) // 2
    radius, angle = np.sqrt(-2.0 * np.log(secret_uniform(half))), 2.0 * np.pi * secret_uniform(half)
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count])
