"""Train one client on several processes, its ranks: each computes a part of every optimiser step's gradient.

Every rank has the adapter, its optimiser and the algorithm's client half. All ranks get the same work and do the same,
except for the forward and backward passes of a step, whose examples are divided among them (`deal`):

    rank 0   examples 0, 3, 4 …  ─ backward ─ gradient ─┐                 ┌─ hooks, clipping, optimiser
    rank 1   examples 1, 2, 5 …  ─ backward ─ gradient ─┴─ one all-reduce ┴─ the same, of the same bits

A step's loss is the sum of its units' losses divided by their number in the *whole* step, which every rank can count. So
the ranks' gradients add up to the step's gradient, whatever the lengths of their answers. A mean of the ranks' means would
differ.

ddp   only sums gradients. torch's DistributedDataParallel (Li et al., "PyTorch Distributed", arXiv 2006.15704) sums
      buckets of many tensors during the backward pass. Here all trained parameters are one flat buffer, so one all-reduce
      of one tensor is enough. A test compares both.
fsdp  also shards the frozen base (models/sharding.py), whose layers are gathered when they are needed. All ranks take part
      in gathering, so all take the same number of passes. A rank without examples takes a pass without labels, which adds
      zeros.

Under ddp, ranks exchange only gradients and a few numbers. This file does not know clients or rounds, nor the code that
starts the processes (runtimes/ranks/worker.py).
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fedloom.data.batching import Batch, collate
from fedloom.data.tokenization import TokenSequence


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of its client. By default there is one rank, and no method communicates.

    Attributes:
        rank, count: this rank's number (from 0), and the number of ranks.
        sharded: whether the base is sharded (fsdp), so that all ranks take part in every forward pass.
        device: this rank's device.
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which evaluates, writes files and sends the result."""
        return self.rank == 0

    def own(self, passes: Sequence[Batch]) -> Sequence[Batch]:
        """Return this rank's passes of a step. Passes without examples are kept only where the base is sharded."""
        if self.count == 1:
            return passes
        return [b for b in passes[self.rank :: self.count] if b.examples or self.sharded]

    def stream(self, name: str) -> str:
        """Return the name of this rank's random stream for dropout: different examples need different masks."""
        return name if self.first else f"{name}/rank-{self.rank}"

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all ranks: the same bits on each."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def total(self, value: float) -> float:
        """Return the sum of a number over all ranks, in float64."""
        if self.count == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(held)
        return float(held)

    def counts(self, *values: int) -> list[int]:
        """Return the sums of whole numbers over all ranks."""
        if self.count == 1:
            return list(values)
        held = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(held)
        return [int(v) for v in held.tolist()]

    def check_alike(self, flat: torch.Tensor) -> None:
        """Raise RuntimeError unless `flat` has the same bits on all ranks. Else an error on one rank would go unnoticed."""
        if self.count == 1:
            return
        own = zlib.crc32(flat.detach().cpu().numpy().tobytes())
        ends = torch.tensor([own, -own], dtype=torch.int64, device=self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if int(ends[0]) != -int(ends[1]):
            raise RuntimeError("the ranks of this client hold different adapters: their training has come apart")

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the block on rank 0 first, and then on the others, which find its results in the cache."""
        if self.count > 1 and not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.count > 1 and self.first:
                dist.barrier()


#: One process: the default everywhere except in a cluster client.
ALONE = Ranks()


def joined(rank: int, count: int, meeting: str, strategy: str | None, device: str) -> Ranks:
    """Join the other ranks. The process group is created at the first call; `strategy` and `device` may change.

    Args:
        meeting: path of a file that only the ranks of this client can access.
        device: cpu, or cuda: each rank takes the GPU of its own number.
    """
    if count == 1:
        return Ranks(device=device)
    if device.startswith("cuda"):  # not yet run on a GPU
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    if not dist.is_initialized():
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # ranks are on one machine: nothing listens outside
            os.environ.setdefault(name, loopback)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=count)
    return Ranks(rank, count, strategy == "fsdp", device)


def deal(lengths: Sequence[int], ranks: int, batch_size: int) -> list[list[int]]:
    """Divide a step's examples among ranks, as passes of at most `batch_size` examples.

    The longest come first, alternately up and down the ranks, so that ranks differ by at most one example and few tokens.

    Returns:
        Positions of examples. Pass p of rank r is entry p·ranks + r; the last one is empty where a rank has fewer examples.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for place, example in enumerate(order):
        lap, seat = divmod(place, ranks)
        hands[seat if lap % 2 == 0 else ranks - 1 - seat].append(example)
    passes = -(-max(len(h) for h in hands) // batch_size)
    cut = [[sorted(h)[p * batch_size : (p + 1) * batch_size] for h in hands] for p in range(passes)]
    return [hand for row in cut for hand in row]


def bystander(sequence: TokenSequence, *, packed: bool, pad: int) -> Batch:
    """Build a pass of one token without a label, for a rank that has no example left but has to take part."""
    return collate([TokenSequence(sequence.ids[:1], 1)], packed=packed, pad=pad)
