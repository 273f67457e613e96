"""Private runs from recipe to report: sampling, resume, what is written where, and recipes that promise nothing."""

from __future__ import annotations

import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from fedloom import run
from fedloom.algorithms.privacy import accounting
from fedloom.cli.console import Display
from fedloom.common.errors import UserError
from fedloom.experiment.prepare import prepare
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.events import read_events
from fedloom.federation.rounds.schedule import Sampling, Schedule
from fedloom.federation.watch import Watch
from fedloom.recipe.recipe import FederationConfig
from tests.helpers import ROOT

#: Of its three rounds the second has no client.
SAMPLED = {
    "privacy": {"noise": 0.8, "clip": 0.05, "seeded": True, "adaptive": {}},
    "federation.clients_per_round": 1, "federation.rounds": 3, "evaluation.every": 0, "seed": 4,
}  # fmt: skip
LOCAL = {"privacy": {"noise": 2.0, "clip": 0.05, "seeded": True, "where": "client"}, "evaluation.every": 0}


def finished_rounds(folder):
    return [e for e in read_events(folder / "events.jsonl") if e["event"] == "round_finished"]


# ------------------------------------------------------------------ sampling


@pytest.mark.parametrize("secret", [False, True])
def test_clients_are_sampled_independently(secret):
    """The number of clients in a round is binomial, every client comes as often, and no pair avoids each other."""
    clients = tuple(f"c{i}" for i in range(5))
    sampling = Sampling(independent=True, secret=secret)
    schedule = Schedule(clients, (), FederationConfig(clients_per_round=2), 1, 1, 3, sampling=sampling)
    rounds = 4000
    there = np.array([[c in schedule.sample(r) for c in clients] for r in range(1, rounds + 1)])
    q = 0.4
    assert np.abs(there.mean(axis=0) - q).max() < 5 * math.sqrt(q * (1 - q) / rounds)
    counts = there.sum(axis=1)
    assert counts.var() == pytest.approx(5 * q * (1 - q), rel=0.15)  # a fixed number has variance 0
    assert (counts == 0).mean() == pytest.approx((1 - q) ** 5, abs=0.02)
    pairs = np.corrcoef(there.T)
    assert np.abs(pairs - np.eye(5)).max() < 5 / math.sqrt(rounds)
    if not secret:
        assert schedule.sample(7) == schedule.sample(7)


def test_sampling_is_what_the_accountant_counts(tiny_recipe):
    def scheduled(**values):
        setting = prepare(tiny_recipe(values), Watch())
        return setting.schedule, setting.algorithm

    schedule, algorithm = scheduled(**{"privacy.noise": 1.0, "federation.clients_per_round": 2})
    assert schedule.sampling.independent and schedule.sampling.secret and algorithm.rate == pytest.approx(2 / 3)
    assert algorithm.expected == 2 and schedule.federation.min_clients == 0
    schedule, algorithm = scheduled(**{"privacy.noise": 1.0, "federation.clients_per_round": 3})
    assert not schedule.sampling.independent and algorithm.rate == 1
    schedule, algorithm = scheduled(
        **{"privacy": {"noise": 1.0, "where": "client"}, "federation.clients_per_round": 2}
    )  # the server sees who sends
    assert not schedule.sampling.independent and algorithm.rate == 1 and algorithm.expected == 2
    schedule, _ = scheduled(**{"federation.clients_per_round": 2})
    assert not schedule.sampling.independent and schedule.federation.min_clients == 1


def test_a_round_without_clients_is_noise_and_counts(tiny_recipe, tmp_path):
    run(tiny_recipe(SAMPLED), tmp_path / "run")
    rounds = finished_rounds(tmp_path / "run")
    assert 0 in [r["updates"] for r in rounds] and max(r["updates"] for r in rounds) > 0
    empty = next(r for r in rounds if r["updates"] == 0)
    assert empty["loss"] is None and empty["metrics"]["distance_moved"] > 0
    for number, event in enumerate(rounds, 1):
        assert event["metrics"]["epsilon"] == accounting.spent(0.8, number, 1 / 3, 1e-5)


# ------------------------------------------------------------------ resume


class Killed(BaseException):
    pass


def killed(recipe, folder, at, **options):
    def tick(what, round, done, total):
        if (what, round, done) == at:
            raise Killed

    with pytest.raises(Killed):
        run(recipe, folder, watch=Watch(tick=tick), **options)


@pytest.mark.parametrize("values", [SAMPLED, LOCAL], ids=["server", "client"])
def test_a_killed_private_run_goes_on_to_the_same_bits_and_the_same_epsilon(values, tiny_recipe, tmp_path):
    recipe = tiny_recipe(values)
    whole = run(recipe, tmp_path / "whole").summary
    killed(recipe, tmp_path / "killed", ("train", 2, 0))
    resumed = run(recipe, tmp_path / "killed", resume=True).summary
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["privacy"] == whole["privacy"]
    states = [Checkpoints(tmp_path / n / "checkpoints").newest()[0].server for n in ("whole", "killed")]
    assert states[0].meta == states[1].meta
    assert all((t == states[1].tensors[n]).all() for n, t in states[0].tensors.items())


def test_noise_of_the_operating_system_differs_from_run_to_run(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"privacy.noise": 1.0, "federation.rounds": 1})
    results = [run(recipe, tmp_path / name).summary for name in ("a", "b")]
    assert results[0]["adapter_sha256"] != results[1]["adapter_sha256"]
    assert results[0]["privacy"] == {**results[1]["privacy"], "seeded": False}


@pytest.mark.parametrize(
    ("where", "seeded", "extra"), [("server", False, 1), ("client", False, 2), ("server", True, 0)]
)
def test_a_round_whose_checkpoint_is_lost_is_released_twice(where, seeded, extra, tiny_recipe, tmp_path):
    """The model of the last round was sent before its checkpoint broke; done again it has other noise, or the same."""
    privacy = {"noise": 2.0, "where": where, "seeded": seeded}
    recipe = tiny_recipe({"privacy": privacy, "evaluation.every": 0})
    run(recipe, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "round-0002" / "server.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = run(recipe, tmp_path / "run", resume=True).summary["privacy"]
    assert again["releases"] == 2 + extra
    assert again["epsilon"] == accounting.spent(2.0 if where == "server" else 1.0, 2 + extra, 1.0, 1e-5)


@pytest.mark.parametrize(("where", "extra"), [("server", 0), ("client", 2)])
def test_an_interrupted_round_counts_where_clients_may_have_sent(where, extra, tiny_recipe, tmp_path):
    recipe = tiny_recipe({"privacy": {"noise": 2.0, "where": where}, "evaluation.every": 0})
    killed(recipe, tmp_path / "run", ("train", 1, 2))
    killed(recipe, tmp_path / "run", ("train", 1, 2), resume=True)
    assert run(recipe, tmp_path / "run", resume=True).summary["privacy"]["releases"] == 2 + extra


# ------------------------------------------------------------------ what is written where


def test_epsilon_is_in_events_summary_report_and_on_the_terminal(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"privacy": {"epsilon": 8, "clip": 0.05}})
    console = Console(record=True, width=300, file=io.StringIO())
    with Display(console) as display:
        result = run(recipe, tmp_path / "run", watch=display.watch())
    summary, rounds = result.summary["privacy"], finished_rounds(tmp_path / "run")
    noise = summary["noise"]
    assert [r["metrics"]["epsilon"] for r in rounds] == [accounting.spent(noise, n, 1.0, 1e-5) for n in (1, 2)]
    assert 7.9 < summary["epsilon"] == rounds[-1]["metrics"]["epsilon"] <= 8
    text = console.export_text()
    for event in rounds:
        assert f"ε {event['metrics']['epsilon']:.3g} (δ 1e-05)" in text
    assert "every client counts the same" in text and f"noise of {noise:g} times the clip" in text
    page = result.report.read_text()
    assert f'ε&thinsp;=&thinsp;<data value="{summary["epsilon"]}">8</data>' in page
    assert f'Gaussian noise of <data value="{noise}">' in page
    assert "Privacy spent over rounds" in page
    stored = (tmp_path / "run" / "recipe.yaml").read_text()
    assert f"noise: {noise}" in stored and "population: 3" in stored
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["privacy"] == summary
    docs = (ROOT / "docs" / "run-folder.md").read_text()
    assert set(summary) == set(re.findall(r"`privacy\.(\w+)`", docs))


def test_without_noise_a_run_says_that_it_promises_nothing(tiny_recipe, tmp_path):
    said = []
    result = run(
        tiny_recipe({"privacy.noise": 0, "federation.rounds": 1}), tmp_path / "run", watch=Watch(say=said.append)
    )
    assert any("nothing is promised" in line for line in said)
    assert result.summary["privacy"]["epsilon"] is None
    assert "Updates were clipped without noise, so there is no guarantee." in result.report.read_text()


def test_without_privacy_nothing_of_it_is_written(tiny_recipe, tmp_path):
    result = run(tiny_recipe(), tmp_path / "run")
    assert result.summary["privacy"] is None
    assert "Privacy" not in result.report.read_text()
    assert all("epsilon" not in r["metrics"] for r in finished_rounds(tmp_path / "run"))


# ------------------------------------------------------------------ recipes that promise nothing


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"privacy": {"clip": 1.0}}, r"privacy needs a noise or an epsilon: set privacy.noise=1.0"),
        ({"privacy": {"noise": 0, "epsilon": 8}}, r"privacy.noise=0 cannot keep privacy.epsilon=8"),
        ({"privacy": {"noise": 1, "delta": 0.4}}, r"privacy.delta=0.4 is no guarantee for 3 clients"),
        ({"privacy": {"noise": 1.0, "epsilon": 2.0}}, r"privacy.noise=1 over 2 rounds spends ε=6.57, more than"),
        ({"privacy": {"noise": 1.0, "adaptive": {"noise": 0.4}}}, r"privacy.adaptive.noise=0.4 spends all"),
        (
            {"privacy": {"noise": 1}, "federation.clients_per_round": 2, "federation.min_clients": 2},
            r"federation.min_clients=2 cannot be used with privacy and clients_per_round=2",
        ),
        ({"privacy": {"noize": 1}}, r"unknown key privacy.noize in the recipe: did you mean privacy.noise\?"),
        ({"privacy.noise_multiplier": 1, "privacy.noise": 1}, r"did you mean privacy.noise\?"),
    ],
)
def test_recipes_that_cannot_be_are_refused_before_anything_is_written(values, sentence, tiny_recipe, tmp_path):
    with pytest.raises(UserError, match=sentence):
        run(tiny_recipe(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_rounds_than_the_target_was_for_are_refused(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"privacy": {"epsilon": 8}, "evaluation.every": 0})
    run(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=r"over 3 rounds spends ε=.*more than privacy.epsilon=8"):
        run(recipe.with_values({"federation.rounds": 3}), tmp_path / "run", resume=True)


def test_the_default_delta_falls_with_the_number_of_clients(tiny_recipe):
    from fedloom.algorithms.privacy.plan import settle_privacy

    recipe = tiny_recipe({"privacy.noise": 1.0})
    assert settle_privacy(recipe, 3)["privacy.delta"] == 1e-5
    assert settle_privacy(recipe, 10**6)["privacy.delta"] == pytest.approx(10**-6.6)
