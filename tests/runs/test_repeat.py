"""The same recipe gives the same bits: in fresh processes, with one thread and two, and only with the same seed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers import tiny


def digest(folder) -> str:
    return json.loads((folder / "summary.json").read_text())["adapter_sha256"]


def fresh(recipe, out, *overrides):
    """A process that shares nothing with this one, not even imports."""
    command = [sys.executable, "-m", "fedloom", "run", str(recipe), *overrides, "--out", str(out), "-q"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    summary = json.loads((out / "summary.json").read_text())
    return summary["adapter_sha256"], summary["environment"]["threads"]


def test_fresh_processes_and_thread_counts_agree(recipe_file, cli, tmp_path):
    recipe = recipe_file({"adapter.dropout": 0.1})  # dropout draws from torch's global generator
    one = fresh(recipe, tmp_path / "one", "runtime.threads=1")
    two = fresh(recipe, tmp_path / "two", "runtime.threads=2")
    assert (one[1], two[1]) == (1, 2)
    assert one[0] == two[0]
    assert cli("run", recipe, "--out", "forked", "-q").code == 0
    assert digest(tmp_path / "forked") == one[0]
    assert cli("run", recipe, "seed=43", "--out", "other", "-q").code == 0
    assert digest(tmp_path / "other") != one[0]


def test_a_client_that_keeps_its_optimiser_trains_through_the_rounds(cli, recipe_file, tmp_path):
    """`local`, kept moments, a constant rate: two rounds of two steps are one round of four, bit for bit."""
    recipe = recipe_file({"algorithm.name": "local", "train.schedule": "constant", "train.optimizer_state": "keep"})
    for name, rounds, steps, more in (("short", 2, 2, []), ("long", 1, 4, []), ("reset", 2, 2, ["reset"])):
        options = [f"federation.rounds={rounds}", f"train.steps={steps}", *(f"train.optimizer_state={o}" for o in more)]
        assert cli("run", recipe, *options, "--out", name, "-q").code == 0
    assert digest(tmp_path / "short") == digest(tmp_path / "long") != digest(tmp_path / "reset")


@pytest.fixture(scope="session")
def seven_million(tmp_path_factory):
    """A random Llama of about seven million weights: large enough that two threads really share its products."""
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = tiny.causal_lm(spread=0.05, num_key_value_heads=4, **shape)
    assert 5.5e6 < model.num_parameters() < 8e6
    return tiny.save_model(tmp_path_factory.mktemp("seven-million"), model)


def test_thread_counts_agree_on_seven_million_parameters(recipe_file, cli, tmp_path, seven_million):
    recipe = recipe_file({
        "model.name": str(seven_million), "adapter.rank": 16, "train.batch_size": 8, "train.steps": 3, "train.lr": 1e-3,
        "split.splitter": "uniform", "split.num_clients": 2, "evaluation.every": 0,
    })  # fmt: skip
    for threads in (1, 2):
        assert cli("run", recipe, f"runtime.threads={threads}", "--out", f"run-{threads}", "-q").code == 0
    assert digest(tmp_path / "run-1") == digest(tmp_path / "run-2")


@pytest.mark.slow
def test_thread_counts_agree_on_the_built_in_model(recipe_file, cli, tmp_path, smollm2):
    recipe = recipe_file({
        "model.name": "smollm2-135m", "adapter.rank": 8, "train.batch_size": 2, "train.steps": 2, "train.lr": 1e-3,
        "federation.rounds": 1, "federation.clients_per_round": 2, "evaluation.every": 0,
    })  # fmt: skip
    for threads in (1, 2):
        assert cli("run", recipe, f"runtime.threads={threads}", "--out", f"run-{threads}", "-q").code == 0
    assert digest(tmp_path / "run-1") == digest(tmp_path / "run-2")
