"""Compiled layers: the results of plain ones, one compilation for all lengths, clients and rounds, refused where it fails.

What make test runs takes torch's tracing without a compiler behind it, which is where code is made anew or not; the
compiler's own code is under `slow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import fedloom
from fedloom.algorithms.base import Algorithm
from fedloom.common.errors import UserError
from fedloom.data.batching import collate
from fedloom.data.tokenization import TokenSequence
from fedloom.experiment.prepare import prepare
from fedloom.federation.checks import check_algorithm, check_recipe
from fedloom.federation.watch import Watch
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.loading import Base
from fedloom.recipe.recipe import AdapterConfig, TrainConfig
from fedloom.training import compiling
from fedloom.training.compiling import compiled, trouble
from tests.helpers import tiny

LORA = {"rank": 2, "alpha": 4, "dropout": 0.1}
DRAW = np.random.default_rng(0)


@contextmanager
def fresh(backend: str) -> Iterator[None]:
    """In this block nothing is compiled yet, as in a new process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "BACKEND", backend)
        torch.compiler.reset()
        compiling._code.cache_clear()
        counters.clear()
        yield
    torch.compiler.reset()
    compiling._code.cache_clear()


@pytest.fixture(scope="module")
def traced() -> Iterator[None]:
    """torch's tracing and its split of forward and backward, and torch's own operations for code; made once for all tests."""
    with fresh("aot_eager"):
        yield


def graphs() -> int:
    """Pieces of code that were made so far."""
    return int(counters["stats"]["unique_graphs"])


def batch_of(*lengths: int, packed: bool = True):
    return collate([TokenSequence(DRAW.integers(3, 259, n).astype(np.int32), 2) for n in lengths], packed=packed, pad=3)


def adapted(**config) -> AdaptedModel:
    base = tiny.causal_lm(spread=0.05, num_hidden_layers=3).requires_grad_(False)
    return attach(Base(base, tiny.tokenizer(), ""), AdapterConfig(**(config or LORA)), 0)


def compare(model: AdaptedModel, batch, **config) -> None:
    """Loss and gradient are those of plain layers (DESIGN 9b), and they went through code."""
    config = TrainConfig(**config)
    loss, gradient = compiling._pass(model, batch, config, False)
    found, same = compiling._pass(model, batch, config, True)
    assert found == pytest.approx(loss, rel=1e-5)
    assert float(gradient.norm()) > 0
    assert float((same - gradient).norm() / gradient.norm()) < 1e-5


def test_one_compilation_serves_all_lengths_and_operators(traced):
    model = adapted()  # dropout draws the same masks with and without
    assert trouble(model, TrainConfig(compile=True), True) == ""
    made = graphs()
    assert 0 < made <= 4  # of one layer, however many there are: what is before attention, behind it, and the rest
    for lengths in ((30, 17), (20, 20), (9,), (40, 33, 11, 5)):
        compare(model, batch_of(*lengths))
    compare(model, batch_of(30, 17), checkpointing=True)
    compare(model, batch_of(30, 17), checkpointing=True, loss_chunk=7)
    model.adapter.flat.normal_(std=0.1)  # another client's
    compare(model, batch_of(21, 8))
    assert graphs() == made
    assert all("forward" not in vars(layer) for layer in model.causal_lm.model.layers)


def test_runs_are_those_of_plain_layers_and_rounds_compile_nothing(traced, tiny_recipe, tmp_path, monkeypatch):
    seen: list[int] = []
    before_step = Algorithm.before_step
    monkeypatch.setattr(Algorithm, "before_step", lambda self, m: seen.append(graphs()) or before_step(self, m))
    more = {"train.eps": 1e-4, "adapter.dropout": 0.1, "train.accumulation": 2, "evaluation.every": 0}
    plain = fedloom.run(tiny_recipe(more), out=tmp_path / "plain")
    made = graphs()
    assert seen == [made] * 12
    seen.clear()
    quick = fedloom.run(tiny_recipe({**more, "train.compile": True}), out=tmp_path / "compiled")
    assert seen == [seen[0]] * 12  # three clients, two rounds, two steps
    assert 0 < seen[0] <= 4  # those of the test above, where it was run: it is the same layer
    assert quick.summary["loss"]["after"] == pytest.approx(plain.summary["loss"]["after"], abs=1e-5)
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "compiled")
    )
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-5)


def test_where_there_is_no_compiler_it_is_refused_before_any_work(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(
        UserError, match=r"train\.compile=true cannot be used: on a CPU torch compiles with .*none, which"
    ):
        fedloom.run(tiny_recipe({"train.compile": True}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert compiling.no_compiler("cuda:0").endswith("pip install triton")


def test_code_that_gives_something_else_is_refused(tiny_recipe, monkeypatch):
    plain = compiling.plain_forward

    def off(cls: type) -> Callable[..., torch.Tensor]:
        return lambda layer, hidden, **kwargs: plain(cls)(layer, 1.01 * hidden, **kwargs)

    monkeypatch.setattr(compiling, "plain_forward", off)
    monkeypatch.setattr(compiling, "_code", lambda forward: forward)
    monkeypatch.setattr(compiling, "no_compiler", lambda device: "")
    with pytest.raises(UserError, match="compiled layers do not give its gradient"):
        prepare(tiny_recipe({"train.compile": True}), Watch())


@pytest.mark.parametrize("algorithm", ["flora", "fedex_lora", "slora", "fedkseed", "fedmezo", "decomfl"])
def test_algorithms_that_it_does_nothing_for_or_would_mislead_are_refused(tiny_recipe, algorithm):
    with pytest.raises(UserError, match=r"train\.compile"):
        check_algorithm(tiny_recipe({"algorithm": algorithm, "train.compile": True}))


def test_cohorts_and_shards_are_refused(tiny_recipe):
    recipe = tiny_recipe({"train.compile": True, "train.cohort": 2})
    with pytest.raises(UserError, match=r"train\.cohort=2 cannot be used: train\.compile=true"):
        check_recipe(recipe)
    with pytest.raises(UserError, match=r"train\.compile=true cannot be used with runtime\.parallel=fsdp"):
        check_algorithm(tiny_recipe({"train.compile": True, "runtime.ranks": 2, "runtime.parallel": "fsdp"}))


def test_passes_without_a_backward_stay_plain(monkeypatch):
    monkeypatch.setattr(compiling, "_code", lambda forward: pytest.fail("compiled"))
    model = adapted()
    with compiled(model), torch.no_grad():
        compiling.token_losses(model, batch_of(9, 4))


METHODS = {**tiny.METHODS, "upper": {"rank": 2, "layers": "last-1"}}


def test_prefixes_of_padded_batches_are_refused():
    model = adapted(**tiny.METHODS["prefix"])
    assert "for each layer by itself" in trouble(model, TrainConfig(compile=True), packed=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "packed"), [(name, packed) for name in METHODS for packed in (True, False) if packed or name != "prefix"]
)
def test_every_method(method, packed):
    with fresh("aot_eager"):
        model = adapted(**METHODS[method])
        assert trouble(model, TrainConfig(compile=True), packed) == ""
        made = graphs()
        for lengths in ((30, 17), (20, 8, 13)):
            compare(model, batch_of(*lengths, packed=packed))
        assert graphs() == made


@pytest.mark.slow
def test_the_compilers_own_code(tiny_recipe, tmp_path, monkeypatch):
    """Inductor: the result of plain layers, and the same bits where a run was killed and carried on in a fresh compilation."""
    more = {"train.eps": 1e-4, "adapter.dropout": 0.1, "evaluation.every": 0, "federation.rounds": 3}
    plain = fedloom.run(tiny_recipe(more), out=tmp_path / "plain").summary
    recipe = tiny_recipe({**more, "train.compile": True})

    def run(name: str, stop: bool = False, **how) -> dict:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"cache-{name}-{how}"))
        with fresh("inductor"):
            watch = Watch(event=lambda e: stop and e["event"] == "checkpoint" and halt())
            return fedloom.run(recipe, out=tmp_path / name, watch=watch, **how).summary

    def halt() -> None:
        raise KeyboardInterrupt

    whole = run("whole")
    assert whole["loss"]["after"] == pytest.approx(plain["loss"]["after"], abs=1e-5)
    with pytest.raises(KeyboardInterrupt):
        run("killed", stop=True)
    again = run("killed", resume=True)
    assert again["adapter_sha256"] == whole["adapter_sha256"]
    assert again["adapter_sha256"] != plain["adapter_sha256"]  # it did go through code


@pytest.mark.slow
def test_a_compiler_that_fails_is_a_sentence(tiny_recipe, tmp_path: Path, monkeypatch):
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\ncase "$*" in *--version*) echo g++ 13;; *) exit 1;; esac\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    from torch._inductor import config  # which has read CXX when it was imported

    with (
        fresh("inductor"),
        config.patch({"cpp.cxx": (None, str(broken))}),
        pytest.raises(UserError, match=r"train\.compile=true cannot be used: torch cannot"),
    ):
        prepare(tiny_recipe({"train.compile": True}), Watch())
