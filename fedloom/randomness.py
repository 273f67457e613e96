"""All randomness comes from here: a generator for each (seed, purpose, round, client), never from global state.

The seed of a generator is the first 63 bits of sha256("seed/purpose/round/client"), so a client draws the same numbers
whatever the order, the runtime or the number of other clients. torch's global generator, which dropout and module
initialisation read, is forked and seeded for the length of one client-round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

#: Every purpose that randomness is drawn for; a new one is added here.
Purpose = Literal[
    "corpus", "split", "sample", "batches", "init", "dropout", "noise", "quantise", "questions", "directions", "seeds",
    "arrival",
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
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derived_seed(seed, purpose, round, client))
        yield
