"""The package's one sum a step against torch's own DistributedDataParallel around a plain loop: the same adapter."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.attach import Models
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.objectives import unit_losses
from fedloom.training.parallel import deal, joined
from fedloom.training.trainer import fit
from tests.helpers import tiny

pytestmark = pytest.mark.slow

TRAIN = TrainConfig(steps=6, batch_size=3, lr=2e-2, eps=1e-4, clip=0.4, schedule="constant")


def made() -> Models:
    base = Base(tiny.causal_lm().requires_grad_(False), tiny.tokenizer(), "made here")
    return Models(ModelConfig(name="tiny"), AdapterConfig(rank=2, alpha=4), 0, _base=base)


def sequences() -> list[list[TokenSequence]]:
    """Six steps of five examples: with two ranks one has three and the other two, of unlike lengths."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 40, (30,), generator=draw).tolist()
    ids = [torch.randint(3, 259, (n,), generator=draw, dtype=torch.int32).numpy() for n in lengths]
    every = [TokenSequence(i, 3) for i in ids]
    return [every[start : start + 5] for start in range(0, 30, 5)]


class Loss:
    """Plain training."""

    def local_loss(self, model, batch, step_units):
        return unit_losses(model, batch).sum() / step_units

    def before_step(self, model):
        pass

    def after_step(self, model):
        pass


def ours(ranks) -> torch.Tensor:
    model = made().adapted()
    steps = [
        [collate([step[i] for i in hand], packed=True, pad=0, examples=hand) for hand in hands]
        for step in sequences()
        for hands in [deal([len(s) for s in step], 2, 3)]
    ]
    fit(model, Loss(), steps, TRAIN, first_step=0, total_steps=6, ranks=ranks)
    return model.adapter.flat


def wrapped(rank: int) -> torch.Tensor:
    """DDP averages over ranks, so a rank's loss counts as many times as there are ranks."""
    model = made().adapted()
    names = sorted(n for n, p in model.module.named_parameters() if p.requires_grad)
    for _, p in model.module.named_parameters():
        p.grad = None
    ddp = DistributedDataParallel(model.module)
    parameters = dict(model.module.named_parameters())
    trained = [parameters[n] for n in names]
    optimizer = torch.optim.AdamW(trained, lr=TRAIN.lr, betas=TRAIN.betas, eps=TRAIN.eps, weight_decay=0.0)
    for step in sequences():
        hand = deal([len(s) for s in step], 2, 3)[rank]
        units = sum(len(s) - 3 for s in step)
        batch = collate([step[i] for i in hand], packed=False, pad=0)
        optimizer.zero_grad()
        logits = ddp(input_ids=batch.ids, attention_mask=batch.mask).logits.flatten(0, 1)[batch.where]
        (2 * torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / units).backward()
        torch.nn.utils.clip_grad_norm_(trained, TRAIN.clip)
        optimizer.step()
    return torch.cat([parameters[n].detach().flatten() for n in names])


def run_rank(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    ranks = joined(rank, 2, meeting, "ddp", "cpu")
    start = made().adapted().adapter.flat.clone()
    mine, theirs = ours(ranks), wrapped(rank)
    assert float((mine - start).abs().max()) > 1e-2
    assert float((mine - theirs).abs().max()) <= 1e-5, float((mine - theirs).abs().max())
    dist.destroy_process_group()


def test_one_sum_is_what_the_wrapper_does(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path / "meeting"),), 2)
