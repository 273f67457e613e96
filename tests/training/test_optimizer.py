"""An optimiser whose state lies elsewhere takes the same steps, bit for bit, and the memory is free meanwhile."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

import fedloom
from fedloom.common import cache_folder
from fedloom.common.errors import RunFailed, UserError
from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch
from fedloom.recipe.recipe import Recipe, TrainConfig
from fedloom.training import optimizer as module
from fedloom.training.optimizer import FlatOptimizer

KINDS = {"adamw": {"weight_decay": 0.1}, "sgd": {"momentum": 0.9, "weight_decay": 0.1}}


def stepped(
    offload: str | None, kind: str, steps: range, flat: torch.Tensor, state=None
) -> tuple[torch.Tensor, FlatOptimizer]:
    """(parameter, optimiser) after some steps from `flat`, each by its own gradient."""
    config = TrainConfig(steps=1, optimizer=kind, optimizer_offload=offload, optimizer_state="keep", **KINDS[kind])
    parameter = torch.nn.Parameter(flat.clone())
    parameter.grad = torch.zeros_like(parameter)
    made = FlatOptimizer(config, parameter, state)
    for number in steps:
        parameter.grad.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(number)))
        made.step(1e-2 / (1 + number))
        with torch.no_grad():
            parameter.mul_(0.99)  # as an algorithm's after_step may
    return parameter.detach(), made


FLAT = torch.randn(1000, generator=torch.Generator().manual_seed(99))


@pytest.fixture(params=["disk", "played GPU", "played GPU, disk"])
def where(request, monkeypatch) -> str:
    """`cpu` is played: the parameter is treated as one that has memory of its own."""
    if request.param != "disk":
        monkeypatch.setattr(module, "_has_memory_of_its_own", lambda device: True)
    return "disk" if "disk" in request.param else "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_same_bits(where, kind):
    plain, own = stepped(None, kind, range(4), FLAT)
    other, away = stepped(where, kind, range(4), FLAT)
    assert torch.equal(plain, other)
    expected, found = own.tensors(), away.tensors()
    assert set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_from_where_it_was(where, kind):
    whole, _ = stepped(None, kind, range(4), FLAT)
    half, first = stepped(where, kind, range(2), FLAT)
    rest, _ = stepped(where, kind, range(2, 4), half, first.tensors())
    assert torch.equal(whole, rest)


def anonymous() -> int:
    """Bytes of this process that are in no file, and so have to stay in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_on_disk_the_moments_need_no_memory():
    used = {}
    for offload in ("disk", None):
        parameter = torch.nn.Parameter(torch.ones(9_000_000))  # 36 MB: glibc never hands out old memory for so much
        parameter.grad = torch.ones_like(parameter)
        gc.collect()
        before = anonymous()
        made = FlatOptimizer(TrainConfig(steps=1, optimizer_offload=offload), parameter)
        made.step(1e-3)
        used[offload] = anonymous() - before
        del made, parameter
    assert used[None] > 70e6
    assert used["disk"] < 2e6


def test_nothing_is_left_behind_and_a_full_disk_is_an_error(monkeypatch):
    stepped("disk", "adamw", range(1), FLAT)
    assert list((cache_folder.cache_home() / "offload").iterdir()) == []

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        stepped("disk", "adamw", range(1), FLAT)
    assert list((cache_folder.cache_home() / "offload").iterdir()) == []


def test_a_full_disk_ends_a_run_in_a_sentence(tiny_recipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        fedloom.run(tiny_recipe({"train.optimizer_offload": "disk"}), out=tmp_path / "run")


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_a_run_has_the_same_bits(tiny_recipe, tmp_path, state):
    digests = {
        fedloom.run(
            tiny_recipe(
                {"train.optimizer_offload": offload, "train.optimizer_state": state, "adapter": {"method": "full"}}
            ),
            out=tmp_path / str(offload),
        ).summary["adapter_sha256"]
        for offload in (None, "disk")
    }
    assert len(digests) == 1


def test_what_has_nothing_to_offload_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="sgd without momentum has no state"):
        Recipe.parse({"train": {"optimizer": "sgd", "optimizer_offload": "disk"}})
    with pytest.raises(UserError, match=r"train\.optimizer_offload=cpu but the model is on the CPU"):
        prepare(tiny_recipe({"train.optimizer_offload": "cpu"}), Watch())


@pytest.mark.parametrize("kind", KINDS)
def test_what_rests_on_disk_and_nobody_keeps_is_not_read(kind):
    """Under `reset` the moments are gone with the client; reading them back would bring them into memory."""
    for offload, state, names in (("disk", "reset", 0), ("disk", "keep", 1), (None, "reset", 1)):
        config = TrainConfig(steps=1, optimizer=kind, optimizer_offload=offload, optimizer_state=state, **KINDS[kind])
        parameter = torch.nn.Parameter(FLAT.clone())
        parameter.grad = torch.ones_like(parameter)
        made = FlatOptimizer(config, parameter)
        assert made.step(1e-2) is None
        assert bool(made.tensors()) == bool(names), (offload, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", [None, "disk"])
def test_state_is_copied_on_its_way_in_and_out(kind, offload):
    """What a client keeps is as it was, whatever steps follow; and a given state is not stepped in place."""
    _, first = stepped(offload, kind, range(2), FLAT)
    kept = first.tensors()
    assert all(t.device.type == "cpu" and not t.requires_grad for t in kept.values())
    before = {n: t.clone() for n, t in kept.items()}
    first._live.grad.fill_(1.0)
    first.step(1e-2)
    assert all(torch.equal(kept[n], before[n]) for n in before)
    assert any(not torch.equal(t, before[n]) for n, t in first.tensors().items())
    _, second = stepped(offload, kind, range(2, 4), FLAT, kept)
    assert all(torch.equal(kept[n], before[n]) for n in before)
    assert any(not torch.equal(t, before[n]) for n, t in second.tensors().items())


def test_an_offloaded_parameter_is_no_alias_of_the_live_one(monkeypatch):
    monkeypatch.setattr(module, "_has_memory_of_its_own", lambda device: True)
    _, away = stepped("cpu", "adamw", range(1), FLAT)
    assert away._own.data_ptr() != away._live.data_ptr()
    assert away._own.grad.data_ptr() != away._live.grad.data_ptr()
    _, plain = stepped(None, "adamw", range(1), FLAT)
    assert plain._own is plain._live
