"""Options of algorithms, operators and hooks: a default or a limit that moves without a word changes what recipes mean."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedloom.common import registry
from tests.helpers import averaging_rounds as rounds

#: (table, name, option, default, limits); `weight_by` and `error_feedback`, which most have, are in the test below it.
OPTIONS = [
    ("algorithms", "decomfl", "epsilon", 0.001, "> 0"),
    ("algorithms", "decomfl", "perturbations", 1, ">= 1"),
    ("algorithms", "diloco", "lr", 0.7, "> 0"),
    ("algorithms", "diloco", "momentum", 0.9, ">= 0 < 1"),
    ("algorithms", "ditto", "lam", 0.1, ">= 0"),
    ("algorithms", "fedadagrad", "lr", 0.01, "> 0"),
    ("algorithms", "fedadagrad", "beta1", 0.0, ">= 0 < 1"),
    ("algorithms", "fedadagrad", "tau", 0.001, "> 0"),
    ("algorithms", "fedadam", "lr", 0.01, "> 0"),
    ("algorithms", "fedadam", "beta1", 0.9, ">= 0 < 1"),
    ("algorithms", "fedadam", "tau", 0.001, "> 0"),
    ("algorithms", "fedadam", "beta2", 0.99, ">= 0 < 1"),
    ("algorithms", "fedavg_outer", "mu", 0.0, ">= 0"),
    ("algorithms", "fedavg_outer", "bottom", 2, ">= 0"),
    ("algorithms", "fedavg_outer", "top", 2, ">= 0"),
    ("algorithms", "fedavgm", "lr", 1.0, "> 0"),
    ("algorithms", "fedavgm", "momentum", 0.5, ">= 0 < 1"),
    ("algorithms", "fedbiot", "mu", 0.01, ">= 0"),
    ("algorithms", "fedbiot", "bottom", 2, ">= 0"),
    ("algorithms", "fedbiot", "top", 2, ">= 0"),
    ("algorithms", "fedbiot", "emulator", "drop_layers", ""),
    ("algorithms", "fedbiot", "drop", None, ">= 0 < 1"),
    ("algorithms", "fedbiot", "bits", 8, ""),
    ("algorithms", "fedbiot", "keep_rank", 0.25, "> 0 <= 1"),
    ("algorithms", "fedbiot", "align", None, ""),
    ("algorithms", "fedbiot", "reference", True, ""),
    ("algorithms", "fedbuff", "buffer", 0.5, "> 0"),
    ("algorithms", "fedbuff", "lr", 1.0, "> 0"),
    ("algorithms", "fedbuff", "staleness", 0.5, ">= 0"),
    ("algorithms", "fedkseed", "seeds", 4096, ">= 1 <= 4096"),
    ("algorithms", "fedkseed", "epsilon", 0.001, "> 0"),
    ("algorithms", "fedmezo", "epsilon", 0.001, "> 0"),
    ("algorithms", "fedmezo", "perturbations", 1, ">= 1"),
    ("algorithms", "fedot", "mu", 0.0, ">= 0"),
    ("algorithms", "fedot", "bottom", 2, ">= 0"),
    ("algorithms", "fedot", "top", 2, ">= 0"),
    ("algorithms", "fedot", "emulator", "drop_layers", ""),
    ("algorithms", "fedot", "drop", None, ">= 0 < 1"),
    ("algorithms", "fedot", "bits", 8, ""),
    ("algorithms", "fedot", "keep_rank", 0.25, "> 0 <= 1"),
    ("algorithms", "fedot", "align", None, ""),
    ("algorithms", "fedot", "reference", True, ""),
    ("algorithms", "fedper", "private_layers", 0.25, "> 0"),
    ("algorithms", "fedper", "private", None, ""),
    ("algorithms", "fedprox", "mu", 0.01, ">= 0"),
    ("algorithms", "fedrep", "private_layers", 0.25, "> 0"),
    ("algorithms", "fedrep", "private", None, ""),
    ("algorithms", "fedrep", "private_steps", 0.5, "> 0 < 1"),
    ("algorithms", "fedyogi", "lr", 0.01, "> 0"),
    ("algorithms", "fedyogi", "beta1", 0.9, ">= 0 < 1"),
    ("algorithms", "fedyogi", "tau", 0.001, "> 0"),
    ("algorithms", "fedyogi", "beta2", 0.99, ">= 0 < 1"),
    ("algorithms", "ferret", "bases", 2048, ">= 1 <= 4096"),
    ("algorithms", "ferret", "coordinates", "unbiased", ""),
    ("algorithms", "ferret", "server_lr", 1.0, "> 0"),
    ("algorithms", "geometric_median", "tolerance", 0.0001, "> 0"),
    ("algorithms", "geometric_median", "iterations", 100, ">= 1"),
    ("algorithms", "geometric_median", "smoothing", 1e-06, "> 0"),
    ("algorithms", "hetlora", "gamma", None, "> 0 < 1"),
    ("algorithms", "hetlora", "penalty", 0.001, ">= 0"),
    ("algorithms", "krum", "hostile", 0.2, ">= 0 < 0.5"),
    ("algorithms", "krum", "keep", 1, ">= 1"),
    ("algorithms", "lora_fair", "strength", 0.01, "> 0"),
    ("algorithms", "norm_bound", "bound", 5.0, "> 0"),
    ("algorithms", "pfedme", "lam", 200.0, "> 0"),
    ("algorithms", "pfedme", "inner_steps", 2, ">= 1"),
    ("algorithms", "pfedme", "beta", 1.0, "> 0"),
    ("algorithms", "slora", "sparse_rounds", 1, ">= 0"),
    ("algorithms", "slora", "density", None, "> 0 <= 1"),
    ("algorithms", "trimmed_mean", "trim", 0.2, ">= 0 < 0.5"),
    ("operators", "bf16", "dtype", "bf16", ""),
    ("operators", "cast", "dtype", "bf16", ""),
    ("operators", "deflate", "level", 6, ">= 1 <= 9"),
    ("operators", "fp16", "dtype", "fp16", ""),
    ("operators", "gzip", "level", 6, ">= 1 <= 9"),
    ("operators", "lz4", "level", 0, ">= 0 <= 12"),
    ("operators", "quantize", "bits", 8, ""),
    ("operators", "quantize", "block", 256, ">= 8 <= 65536"),
    ("operators", "quantize", "rounding", "nearest", ""),
    ("operators", "sparsify", "method", "top_k", ""),
    ("operators", "sparsify", "fraction", 0.1, "> 0 <= 1"),
    ("operators", "sparsify", "rescale", False, ""),
    ("operators", "zstd", "level", 3, ">= 1 <= 19"),
    ("hooks", "early_stopping", "patience", 3, ">= 1"),
    ("hooks", "early_stopping", "min_delta", 0.0, ">= 0"),
    ("hooks", "early_stopping", "every", 1, ">= 1"),
    ("hooks", "ema", "decay", 0.8, ">= 0 < 1"),
    ("hooks", "ema", "deploy", True, ""),
    ("hooks", "gradient_noise", "decay", 0.95, ">= 0 < 1"),
    ("hooks", "validation_loss", "every", 1, ">= 1"),
]  # fmt: skip


def fields(table: str, name: str) -> Any:
    return getattr(registry, table).get(name).Options.model_fields


def beyond_a_limit(table: str, name: str, option: str, value: Any) -> bool:
    """Whether this value is refused for a limit of the option; whatever else is wrong with it does not count."""
    try:
        getattr(registry, table).get(name).Options.model_validate({option: value})
    except ValidationError as error:
        return any(e["loc"] == (option,) and re.match("(greater|less)_than", e["type"]) for e in error.errors())
    return False


def test_the_table_is_complete():
    there = {
        (table, name, option)
        for table in ("algorithms", "operators", "hooks")
        for name in getattr(registry, table).names()
        for option in fields(table, name)
        if option not in ("weight_by", "error_feedback")
    }
    assert {row[:3] for row in OPTIONS} == there


@pytest.mark.parametrize(("table", "name", "option", "default", "limits"), OPTIONS)
def test_defaults_and_limits(table, name, option, default, limits):
    """At each limit: the value itself, and the next one inside and outside."""
    given = fields(table, name)[option].get_default(call_default_factory=True)
    assert given == default and type(given) is type(default)
    step = 1 if isinstance(default, int) and not isinstance(default, bool) else 1e-9
    for sign, number in re.findall(r"([<>]=?) (\S+)", limits):
        at, inwards = float(number), step if sign.startswith(">") else -step
        assert beyond_a_limit(table, name, option, at) == (len(sign) == 1), f"{sign} {number}"
        assert beyond_a_limit(table, name, option, at - inwards)
        assert not beyond_a_limit(table, name, option, at + inwards)
    constrained = [m for m in fields(table, name)[option].metadata if re.search("[gl][te]=", repr(m))]
    assert len(constrained) == len(re.findall("[<>]", limits))


def test_clients_weigh_by_their_examples_and_nothing_is_fed_back_unless_it_is_asked_for():
    for name in registry.algorithms.names():
        if "weight_by" in fields("algorithms", name):
            expected = "norm" if name == "hetlora" else "examples"
            assert fields("algorithms", name)["weight_by"].default == expected, name
    feedback = {n for n in registry.operators.names() if "error_feedback" in fields("operators", n)}
    assert feedback == {"bf16", "cast", "fp16", "quantize", "sparsify"}
    assert not any(fields("operators", name)["error_feedback"].default for name in feedback)


MOVING = ("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco", "fedbuff", "median", "trimmed_mean",
          "krum", "geometric_median", "norm_bound")  # fmt: skip


@pytest.mark.parametrize("name", MOVING)
def test_the_distance_moved_is_how_far_the_server_s_model_went(name):
    algorithm = rounds.server(name, rounds.drawn(0))
    for number in (1, 2):
        before = algorithm.shared.flat.double().clone()
        updates = [rounds.update(f"c{i}", rounds.drawn(10 * number + i), i + 1, round=number) for i in range(5)]
        metrics = algorithm.aggregate(iter(updates))
        distance = float(torch.linalg.vector_norm(algorithm.shared.flat.double() - before))
        assert metrics["distance_moved"] == pytest.approx(distance, rel=1e-5)
        assert distance > 1e-3


#: Flag of `Properties` that is not what most have → who has it. Rules, runtimes and other contracts go by these.
FLAGS = {
    "asynchronous": "fedbuff",
    "cohorts": "decomfl fedbiot fedkseed fedmezo fedot slora",
    "exact": "fed_sb fedex_lora fedsvd ffa_lora flora rolora",
    "mixed_ranks": "flexlora flora hetlora",
    "offsite": "fedbiot fedot",
    "order_independent": "fedbuff",
    "personal": "ditto feddpa fedper fedrep fedsa_lora local pfedme",
    "pooled": "global",
    "streams": "fedex_lora fedit flexlora flora geometric_median krum lora_fair median trimmed_mean",
    "weights": "fedbiot fedex_lora fedot flora slora",
}


def test_the_flags_of_algorithms():
    """`linear_sum` has its list in tests/algorithms/privacy/test_private.py."""
    from fedloom.algorithms.base import Properties

    usual = Properties()
    kinds = {f: {n for n in registry.algorithms.names() if getattr(registry.algorithms.get(n).properties, f) is not getattr(usual, f)}
             for f, value in vars(usual).items() if isinstance(value, bool) and f != "linear_sum"}  # fmt: skip
    assert kinds == {flag: set(names.split()) for flag, names in FLAGS.items()}
