"""One client on several processes, its ranks: each takes its part of every optimiser step, and one sum makes them one.

Every rank holds the adapter, its optimiser and the algorithm's client half; all are asked the same and do the same, but
for the forward and backward passes of a step, whose examples are dealt out among them (`deal`):

    rank 0   examples 0, 3, 4 …  ─ backward ─ gradient ─┐                 ┌─ hooks, clipping, optimiser
    rank 1   examples 1, 2, 5 …  ─ backward ─ gradient ─┴─ one all-reduce ┴─ the same, of the same bits

A step's loss is the sum of its units' losses over their number in the *whole* step, which every rank can count. So the
ranks' gradients add up to the step's, whoever had the longer answers; a mean of the ranks' means would not be that.

ddp   is that sum and nothing else. torch's DistributedDataParallel (Li et al., "PyTorch Distributed", arXiv 2006.15704)
      sums in buckets of many tensors while backward goes on; here all that trains is one flat buffer, so it is one
      all-reduce of one tensor. A test holds both to the same numbers.
fsdp  besides shards the frozen base (models/sharding.py), whose layers are gathered when they are needed. Gathering is
      common work, so ranks take equally many passes: one that is short takes a pass without labels, which adds zeros.

Nothing but gradients of what trains, and a few numbers, is exchanged under ddp. This file does not know clients or
rounds, nor who started the processes (runtimes/ranks/worker.py).
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
    """This process's place among the ranks of its client. By default it is alone, and every method does nothing.

    Attributes:
        rank, count: which of how many.
        sharded: whether the base is sharded (fsdp), so that all take part in every forward pass.
        device: this rank's own.
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all: it evaluates, writes files and answers."""
        return self.rank == 0

    def own(self, passes: Sequence[Batch]) -> Sequence[Batch]:
        """This rank's passes of a step; those without examples only where all ranks have to go along."""
        if self.count == 1:
            return passes
        return [b for b in passes[self.rank :: self.count] if b.examples or self.sharded]

    def stream(self, name: str) -> str:
        """Whose random numbers this rank draws for dropout: ranks have different examples and need different masks."""
        return name if self.first else f"{name}/rank-{self.rank}"

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all ranks: the same bits on each."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def total(self, value: float) -> float:
        """The sum of a number over all ranks, in float64."""
        if self.count == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(held)
        return float(held)

    def counts(self, *values: int) -> list[int]:
        """The sums of whole numbers over all ranks."""
        if self.count == 1:
            return list(values)
        held = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(held)
        return [int(v) for v in held.tolist()]

    def check_alike(self, flat: torch.Tensor) -> None:
        """Raise RuntimeError unless all ranks hold the same bits: one that drew or skipped on its own would go unnoticed."""
        if self.count == 1:
            return
        own = zlib.crc32(flat.detach().cpu().numpy().tobytes())
        ends = torch.tensor([own, -own], dtype=torch.int64, device=self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if int(ends[0]) != -int(ends[1]):
            raise RuntimeError("the ranks of this client hold different adapters: their training has come apart")

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first rank goes through this block before the others begin with it, so that they find what it has cached."""
        if self.count > 1 and not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.count > 1 and self.first:
                dist.barrier()


#: One process, as everywhere but in a cluster client.
ALONE = Ranks()


def joined(rank: int, count: int, meeting: str, strategy: str | None, device: str) -> Ranks:
    """Join the other ranks, once in a process; `strategy` and `device` may differ between recipes.

    Args:
        meeting: a file that all ranks of this client can reach and nobody else can.
        device: cpu, or cuda, of which each rank takes the GPU of its own number.
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
    """A step's examples, by their position, as passes of at most `batch_size` on each rank.

    The longest go first, back and forth over the ranks, so that ranks differ by one example at most and by few tokens.
    Pass p of rank r is entry p·ranks + r; where a rank is short of examples its last entry is empty.
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
    """A pass of one token without a label, for a rank that has no example left while others need it to go along."""
    return collate([TokenSequence(sequence.ids[:1], 1)], packed=packed, pad=pad)
