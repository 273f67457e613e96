"""What cannot be said of a whole run, as far as the recipe alone tells: runtime, devices, privacy, cohorts."""

from __future__ import annotations

import torch

from fedloom.common import registry
from fedloom.evaluation.pick_suite import public_suite_message
from fedloom.federation.checks.facts import RecipeFacts
from fedloom.federation.checks.rule import Rule
from fedloom.federation.cohorts import alone_by_recipe


def _private_hook(f: RecipeFacts) -> str:
    """The first hook that reports more of the data than the model does."""
    return next((name for name, hook in f.hooks.items() if hook.tells_of_data), "") if f.recipe.privacy else ""


def _task_suite(f: RecipeFacts) -> str:
    """A suite that is measured once."""
    wanted = f.recipe.evaluation.suite
    return wanted if wanted and wanted not in registry.suites and wanted in registry.task_suites else ""


def _alone(f: RecipeFacts) -> str:
    """Why no clients can train together, where the recipe asks for a number of them."""
    return alone_by_recipe(f.recipe) if f.recipe.train.cohort not in ("off", "auto") else ""


RUN_RULES = (
    Rule[RecipeFacts](
        "runtime.offsite",
        "a runtime that moves clients between processes, with an algorithm that sends an emulator once",
        lambda f: f.properties.offsite and not f.can.keeps_clients,
        lambda f, _: (
            f"algorithm {f.recipe.algorithm.name} sends an emulator once, which a client's process has to keep, and "
            f"runtime.name={f.recipe.runtime.name} moves clients between processes: use runtime.name=simulator"
        ),
    ),
    Rule[RecipeFacts](
        "runtime.pooled",
        "an algorithm that pools all clients' data, between sites",
        lambda f: f.properties.pooled and not f.can.pooled_tests,
        lambda f, _: (
            f"algorithm {f.recipe.algorithm.name} pools all clients' data, which no federation of sites can: run it in the "
            "simulator (runtime.name=simulator)"
        ),
    ),
    Rule[RecipeFacts](
        "devices.missing",
        "`adapter.ranks: by device` without `devices`",
        lambda f: f.recipe.adapter.ranks == "by device" and f.recipe.devices is None,
        lambda f, _: 'adapter.ranks="by device" needs devices: add a devices section, or give each client its rank',
    ),
    Rule[RecipeFacts](
        "devices.real_time",
        "`devices` in a runtime whose time is real",
        lambda f: f.recipe.devices is not None and not f.can.virtual,
        lambda f, _: (
            f"devices are simulated, and time is real with runtime.name={f.recipe.runtime.name}: use "
            "runtime.name=simulator, or leave devices out"
        ),
    ),
    Rule[RecipeFacts](
        "devices.privacy",
        "`devices` with `privacy`",
        lambda f: f.recipe.devices is not None and f.recipe.privacy is not None,
        lambda f, _: (
            "devices cannot be used with privacy, whose accountant does not know who is there or late: leave one of them "
            "out"
        ),
    ),
    Rule[RecipeFacts](
        "devices.pooled",
        "`devices` with an algorithm that trains on everybody's data in one place",
        lambda f: f.recipe.devices is not None and f.properties.pooled,
        lambda f, _: (
            f"devices cannot be used with algorithm {f.recipe.algorithm.name}, which trains on everybody's data in one "
            "place: leave devices out"
        ),
    ),
    Rule[RecipeFacts](
        "devices.offsite",
        "`devices` with an algorithm that sends an emulator once",
        lambda f: f.recipe.devices is not None and f.properties.offsite,
        lambda f, _: (
            f"devices cannot be used with algorithm {f.recipe.algorithm.name}, which sends an emulator again after a "
            "restart: leave devices out"
        ),
    ),
    Rule[RecipeFacts](
        "devices.deadline",
        "`devices.deadline` with an asynchronous algorithm",
        lambda f: f.recipe.devices is not None and f.properties.asynchronous and f.recipe.devices.deadline is not None,
        lambda f, _: (
            f"devices.deadline={f.recipe.devices.deadline if f.recipe.devices else 0:g} but algorithm "
            f"{f.recipe.algorithm.name} waits for nobody: leave devices.deadline out"
        ),
    ),
    Rule[RecipeFacts](
        "privacy.hooks",
        "`privacy` with a hook that reports more of the data than the model does",
        _private_hook,
        lambda f, hook: f"the hook {hook} makes numbers that privacy does not cover: leave it out, or set privacy=null",
    ),
    Rule[RecipeFacts](
        "evaluation.suite",
        "a public benchmark as `evaluation.suite`, which a run measures every round",
        _task_suite,
        lambda f, suite: public_suite_message(suite),
    ),
    Rule[RecipeFacts](
        "cohort.recipe",
        "a number as `train.cohort` where clients cannot train together ([cohort.md](cohort.md) lists the reasons)",
        _alone,
        lambda f, why: (
            f"train.cohort={f.recipe.train.cohort} cannot be used: {why}; set train.cohort=off (docs/cohort.md)"
        ),
    ),
)


#: GPUs of the machine on which the ranks run.
GPU_RULES = (
    Rule[RecipeFacts](
        "ranks.one_gpu",
        "`runtime.ranks` with a `runtime.device` that is one GPU",
        lambda f: f.strategy and f.device.startswith("cuda:"),
        lambda f, _: (
            f"runtime.device={f.device} is one GPU, but runtime.ranks={f.recipe.runtime.ranks} takes the first "
            f"{f.recipe.runtime.ranks}: set runtime.device=cuda, and choose among GPUs with CUDA_VISIBLE_DEVICES"
        ),
    ),
    Rule[RecipeFacts](
        "ranks.gpus",
        "more `runtime.ranks` than there are GPUs",
        lambda f: f.strategy and f.device == "cuda" and torch.cuda.device_count() < f.recipe.runtime.ranks,
        lambda f, _: (
            f"runtime.ranks={f.recipe.runtime.ranks} but torch sees {torch.cuda.device_count()} GPUs, and each rank needs "
            "one: lower runtime.ranks, or set runtime.device=cpu"
        ),
    ),
)
