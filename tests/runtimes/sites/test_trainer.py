"""A site's own half: its policy, its files, its split, and a whole run between sites in this process."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace

import pytest
import torch

from fedloom.common.errors import UserError
from fedloom.common.registry import Registry
from fedloom.common.yaml import dump_yaml
from fedloom.data.loading import load_data
from fedloom.data.shard_file import is_shard, read_shard, write_shard
from fedloom.data.splitters import partition
from fedloom.experiment.run import run
from fedloom.federation.record.events import read_events
from fedloom.federation.record.run_folder import RunFolder
from fedloom.messages.types import Failure, Payload, Update
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.sites.policy import Policy, Refused
from fedloom.runtimes.sites.project import Project, SiteConfig
from fedloom.runtimes.sites.trainer import Room, localised, own_data, run_folder
from fedloom.runtimes.versions import mismatch, own
from fedloom.training import precision
from tests.helpers.sites import between_sites

pytest.importorskip("nvflare")


# ------------------------------------------------------------------ a run


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.optimizer_state": "keep"},
        {"operators": {"up": [{"name": "quantize", "bits": 8}, {"name": "deflate"}], "down": [{"name": "bf16"}]}},
        {"algorithm": "ditto"},
    ],
    ids=["plain", "operators", "personal"],
)
def test_sites_make_the_simulators_adapter(tiny_recipe, dealt, tmp_path, overrides):
    """The same recipe and partition: the same adapter_sha256, losses and updates, though nobody sees others' data."""
    recipe = tiny_recipe({**overrides, "evaluation.every": 0})
    simulated = run(recipe, tmp_path / "simulated").summary
    found = between_sites(recipe, dealt(recipe), tmp_path / "sites").summary
    assert found["adapter_sha256"] == simulated["adapter_sha256"]
    assert found["per_client"] == simulated["per_client"] or overrides.get("algorithm")
    assert found["loss"]["before"] == simulated["loss"]["before"]
    numbers = [
        [
            (e["client"], e["loss"], e["examples"])
            for e in read_events(tmp_path / n / "events.jsonl")
            if e["event"] == "client_update"
        ]
        for n in ("simulated", "sites/run")
    ]
    assert numbers[0] == numbers[1]
    if not overrides.get("algorithm"):
        assert torch.equal(*(_tensors(tmp_path / n / "adapter") for n in ("simulated", "sites/run")))


def _tensors(folder):
    from safetensors.torch import load_file

    return torch.cat([t.flatten() for _, t in sorted(load_file(folder / "adapter_model.safetensors").items())])


@pytest.mark.parametrize("times", [0.5, 2.0])
def test_each_site_chooses_its_precision(tiny_recipe, dealt, tmp_path, monkeypatch, times):
    """By a device that is quicker in bf16, or is not; the server's is not asked."""
    asked = []
    monkeypatch.setattr(precision, "slowdown", lambda device, kind: asked.append(kind) or times)
    more = {"evaluation.every": 0, "federation.rounds": 1}
    recipe = tiny_recipe({**more, "train.precision": "auto"})
    files = dealt(recipe)
    found = between_sites(recipe, files, tmp_path / "sites")
    assert len(asked) == len(files)
    assert Recipe.load(found.folder / "recipe.yaml").train.precision == "auto"
    fixed = tiny_recipe({**more, "train.precision": "bf16" if times < 1 else "fp32"})
    assert found.summary["adapter_sha256"] == run(fixed, tmp_path / "simulated").summary["adapter_sha256"]


def test_each_site_tries_its_own_kernel_and_the_servers_decides_nothing(tiny_recipe, dealt, tmp_path, monkeypatch):
    wanted = []

    def chosen(wish, *_):
        wanted.append(wish)
        return "sdpa" if wish == "sdpa" else "flash_attention_2"

    recipe = tiny_recipe({"evaluation.every": 0, "federation.rounds": 1})
    plain = run(recipe, tmp_path / "simulated").summary
    files = dealt(recipe)
    monkeypatch.setattr("fedloom.models.loading.choose_attention", chosen)
    monkeypatch.setattr(
        "fedloom.models.attention.gpu._flash_function", lambda: lambda q, *a, **k: q
    )  # a kernel that is off
    found = between_sites(recipe, files, tmp_path / "sites")
    assert sorted(wanted) == ["auto"] * len(files) + ["sdpa"]
    assert Recipe.load(found.folder / "recipe.yaml").train.packing == "on"
    assert found.summary["adapter_sha256"] == plain["adapter_sha256"]


def test_a_finished_run_is_read_by_a_server_without_its_sites_kernel(tiny_recipe, tmp_path):
    from fedloom.experiment.local_sites import result

    RunFolder(tmp_path).write_recipe(tiny_recipe({"model.attention": "flex"}))  # personal results stay with the sites
    (tmp_path / "summary.json").write_text("{}")
    assert result(tmp_path).tokenizer is not None


def test_no_word_of_the_data_is_in_what_the_server_keeps(tiny_recipe, dealt, tmp_path):
    recipe = tiny_recipe()
    files = dealt(recipe)
    between_sites(recipe, files, tmp_path / "sites")
    words = {json.loads(line)["instruction"] for f in files.values() for line in f.read_text().splitlines()[1:]}
    kept = "".join(
        p.read_text(errors="replace")
        for p in (tmp_path / "sites" / "run").rglob("*")
        if p.suffix in {".json", ".jsonl", ".html", ".yaml"}
    )
    assert not [w for w in words if len(w) > 10 and w in kept]


def test_pooled_data_is_refused_before_anything_is_sent(tiny_recipe):
    from fedloom.experiment.site_data import check

    with pytest.raises(UserError, match="pools all clients' data"):
        check(tiny_recipe({"algorithm": "global", "runtime.name": "distributed"}), ["a", "b"])


# ------------------------------------------------------------------ the site's own settings


def site(tmp_path, **more):
    return SiteConfig(client="a", home=str(tmp_path), policy="none", **{"data": str(tmp_path / "rows.jsonl"), **more})


def test_a_site_puts_its_own_settings_into_the_recipe(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"train.batch_size": 4, "train.accumulation": 3})
    own_one = localised(recipe, site(tmp_path, batch_size=2, device="cpu", threads=1, columns={"output": "answer"}))
    assert (own_one.train.batch_size, own_one.train.accumulation) == (2, 6), "a step keeps its twelve examples"
    assert own_one.data.path == str(tmp_path / "rows.jsonl")
    assert own_one.data.columns == {"output": "answer"}
    with pytest.raises(UserError, match="does not divide the recipe's step of 12"):
        localised(recipe, site(tmp_path, batch_size=5))


def test_a_site_has_as_many_ranks_as_it_says(tiny_recipe, tmp_path):
    """Its own number and strategy count, whatever the recipe says; without one the recipe's, within the policy."""
    recipe = tiny_recipe({"runtime.ranks": 4, "runtime.parallel": "fsdp"})
    for own_site, started, expected in (
        (site(tmp_path), 4, (4, "fsdp")),
        (site(tmp_path, parallel="ddp"), 4, (4, "ddp")),
        (site(tmp_path, ranks=2), 2, (2, "fsdp")),
        (site(tmp_path, ranks=1), 1, (1, None)),
    ):
        runtime = localised(recipe, own_site, started).runtime
        assert (runtime.ranks, runtime.parallel) == expected
    assert localised(tiny_recipe(), site(tmp_path, threads=5), 2).runtime.threads_of_a_rank == 2
    policy = Policy.model_validate({"ranks": 3})
    assert policy.ranks_of(tiny_recipe({"runtime.ranks": 3}).resolved()) == 3
    for wanted in (4, 0, "2", 10**9):
        with pytest.raises(Refused, match=r"allows 3 \(ranks\)"):
            policy.ranks_of({"runtime": {"ranks": wanted}})


def test_a_site_keeps_the_runs_that_were_opened_last(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    """The present one always, whatever the clock and the folders say; nothing is deleted that is no run's folder."""
    home, runs = tmp_path / "home", [f"{i:032x}" for i in range(5)]
    (home / "runs" / "notes").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (home / "runs" / ("a" * 32)).symlink_to(elsewhere)
    for age, run_id in enumerate(runs[:4]):
        (run_folder(home, run_id, 9) / "clients").mkdir()
        os.utime(home / "runs" / run_id, (1000 + age, 1000 + age))
    caplog.clear()
    run_folder(home, runs[0], 3)  # the oldest is carried on
    assert left(home) == {runs[0], runs[2], runs[3]}
    assert sum("keep_runs" in text for text in caplog.messages) == 1
    run_folder(home, runs[4], 2)
    assert left(home) == {runs[0], runs[4]}, "what was carried on is newer than what began after it"
    os.utime(home / "runs" / runs[4], (2**33, 2**33))  # a clock that was put back
    run_folder(home, runs[0], 1)
    assert left(home) == {runs[0]}
    assert (home / "runs" / "notes").is_dir()
    assert elsewhere.is_dir()


def left(home):
    return {p.name for p in (home / "runs").iterdir() if p.name != "notes" and not p.is_symlink()}


def test_a_site_that_keeps_one_run_ends_with_its_last(tiny_recipe, dealt, tmp_path, monkeypatch):
    """Through the site's own code, by the setting in its file."""
    recipe = tiny_recipe({"federation.rounds": 1, "evaluation.every": 0, "algorithm": "ditto"})
    files = dealt(recipe)
    first = SiteConfig.model_fields["keep_runs"].default
    assert first == 5
    monkeypatch.setattr("tests.helpers.sites.SiteConfig", lambda **values: SiteConfig(**values, keep_runs=1))
    kept = []
    for overwrite in ("one", "two"):
        between_sites(recipe, files, tmp_path / "sites")
        kept.append({p.name for p in (tmp_path / "sites" / "last" / "runs").iterdir()})
        shutil.move(tmp_path / "sites" / "run", tmp_path / overwrite)
    assert [len(k) for k in kept] == [1, 1]
    assert kept[0] != kept[1]
    assert list((tmp_path / "sites" / "last" / "runs").rglob("*.safetensors")), "the state of the run that is kept"


def test_a_sites_trainer_is_started_with_its_ranks(tiny_recipe, tmp_path, monkeypatch):
    from fedloom.runtimes.sites.flare import executor

    started = []
    monkeypatch.setattr(executor, "Worker", lambda command, log, limit, ranks: started.append(ranks))
    monkeypatch.setattr(executor, "Agent", lambda start, *rest: start)
    recipe = tiny_recipe({"runtime.ranks": 2}).resolved()
    executor.open_agent(site(tmp_path))(recipe)
    executor.open_agent(site(tmp_path, ranks=16))(recipe)
    assert started == [2, 16]
    with pytest.raises(Refused, match="asks for 9 ranks"):
        executor.open_agent(site(tmp_path))(tiny_recipe({"runtime.ranks": 9}).resolved())


def test_a_site_splits_its_own_data(tiny_recipe, tiny_data, tmp_path):
    corpus, parts, asked = own_data(tiny_recipe(), site(tmp_path, data=str(tiny_data)), 3)
    shard = parts.shards["a"]
    assert len(shard.indices) == len(set(shard.indices)) == len(corpus.examples) == 60
    assert (len(shard.test), len(shard.validation)) == (12, 3)
    assert len(asked) <= 3 * 7, "of 20 questions for each task a third of the sites takes seven"
    again = own_data(tiny_recipe(), site(tmp_path, data=str(tiny_data)), 3)
    assert again[1] == parts


def test_a_shard_round_trips_with_its_order_and_questions(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"evaluation.suite": None})
    corpus, split = load_data(recipe)
    clients = partition(corpus, split, recipe.seed)
    shard = clients.shards["upper"]
    path = tmp_path / "shard.jsonl"
    write_shard(path, corpus, shard, shard.test[:2])
    assert is_shard(path)
    read, parts, asked = read_shard(path, "upper", 0)
    mine = parts.shards["upper"]
    for part in ("train", "validation", "test"):
        assert [read.examples[i] for i in getattr(mine, part)] == [corpus.examples[i] for i in getattr(shard, part)]
    assert [read.examples[i] for i in asked] == [corpus.examples[i] for i in shard.test[:2]]
    path.write_text(path.read_text().replace('"train"', '"trial"', 1).replace('"question"', '"answer"'))
    with pytest.raises(UserError, match="cannot be read"):
        read_shard(path, "upper", 0)


# ------------------------------------------------------------------ policy


def test_what_leaves_is_numbers_and_names():
    policy = Policy.model_validate({})
    update = Update("a", 1, Payload({}, {"digest": "ab12", "steps": 3}), 5, 40, {"loss": 1.5})
    assert policy.outgoing(update) == update
    for wrong in (
        replace(update, metrics={"loss": "The patient"}),
        replace(update, metrics={"the patient was": 1.0}),
        replace(update, payload=Payload({}, {"note": "The patient was seen"})),
        replace(update, payload=Payload({}, {"The patient was seen": 1})),
        replace(update, payload=Payload({}, {"list": [{"deep": "two words"}]})),
    ):
        with pytest.raises(Refused):
            policy.outgoing(wrong)


def test_a_failure_leaves_as_a_code_unless_the_site_allows_its_words():
    failure = Failure("a", 1, "non_finite", "step 3 saw 'The patient was seen'")
    assert Policy.model_validate({}).outgoing(failure).detail == "the site's log says more"
    assert Policy.model_validate({"error_text": True}).outgoing(failure) == failure
    assert Policy.model_validate({}).outgoing(replace(failure, reason="The patient")).reason == "error"


def test_a_trainers_error_leaves_as_a_type_and_a_line(tiny_recipe, tmp_path, caplog):
    secret = tmp_path / "rows.jsonl"
    secret.write_text('{"instruction": "The patient", "output": 1}\n{"instruction": "x"\n')
    orders = {"recipe": tiny_recipe().resolved(), "run": "0" * 32, "sites": 1}
    for text, where in ((False, "the site's log says more"), (True, "line 2")):
        room = Room(site(tmp_path), Policy.model_validate({"error_text": text}))
        header, _ = room.answer("prepare", json.dumps(orders).encode())
        assert (header["state"], header["reason"]) == ("failed", "misconfigured")
        assert where in header["detail"]
    assert "line 2" in caplog.text


def test_a_programming_errors_words_stay_in_the_sites_log(tiny_recipe, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("The patient was seen")

    monkeypatch.setattr("fedloom.runtimes.sites.trainer.open_site", broken)
    orders = json.dumps({"recipe": tiny_recipe().resolved(), "run": "0" * 32, "sites": 1}).encode()
    for allowed in (False, True):
        header, _ = Room(site(tmp_path), Policy.model_validate({"error_text": allowed})).answer("prepare", orders)
        assert header["reason"] == "error"
        assert header["detail"].startswith("KeyError in test_trainer, line ")
        assert ("The patient was seen" in header["detail"]) is allowed
    assert "The patient was seen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "recipe", "words"),
    [
        ({"methods": ["ia3"]}, {}, "methods: ia3"),
        ({"operators": ["bf16"]}, {"operators": {"up": [{"name": "quantize", "bits": 8}]}}, "does not allow quantize"),
        ({"largest_epsilon": 2.0}, {"privacy": {"epsilon": 8.0, "clip": 1.0}}, "privacy.epsilon=8.0"),
        ({}, {"model": {"name": "x", "trust_remote_code": True}}, "trust_remote_code"),
    ],
)
def test_a_policy_refuses_more_than_it_allows(tiny_recipe, policy, recipe, words):
    resolved = tiny_recipe().resolved() | recipe
    with pytest.raises(Refused, match=words):
        Policy.model_validate(policy).check(resolved)
    Policy.model_validate({"largest_epsilon": 8.0, "methods": ["lora"]}).check(
        tiny_recipe().resolved() | {"privacy": {"epsilon": 8.0}}
    )


def test_a_policy_that_cannot_be_read_is_said(tmp_path):
    assert Policy.load(tmp_path / "none.yaml") == Policy.model_validate({})
    for text in ("algorithms: 3", "alogrithms: []", "x: ["):
        (tmp_path / "policy.yaml").write_text(text)
        with pytest.raises(UserError, match=r"policy\.yaml"):
            Policy.load(tmp_path / "policy.yaml")


# ------------------------------------------------------------------ project, versions


def project(tmp_path, **more):
    path = tmp_path / "project.yaml"
    path.write_text(dump_yaml({"name": "hospitals", "sites": ["a", {"name": "b", "client": "the b"}], **more}))
    return Project.load(path)


def test_a_project_names_its_sites_and_their_clients(tmp_path):
    assert project(tmp_path).clients == {"a": "a", "the b": "b"}
    assert project(tmp_path, revoked=["a"]).clients == {"the b": "b"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sites": ["a", "a"]}, "same name a"),
        ({"sites": ["server"]}, "cannot name a site"),
        ({"sites": ["a b"]}, "cannot name a site"),
        ({"sites": [{"name": "a", "client": "x"}, {"name": "b", "client": "x"}]}, "same client x"),
        ({"sites": []}, "sites"),
        ({"revoked": ["c"]}, "there is no site c"),
        ({"server": {"host": "a b"}}, "no host name"),
        ({"server": {"port": 0}}, r"server\.port"),
        ({"stie": 1}, "stie"),
    ],
)
def test_a_project_file_that_cannot_be_is_refused_with_a_sentence(tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        project(tmp_path, **more)


def test_versions_are_compared_where_they_matter():
    assert mismatch(own(), own()) is None
    assert mismatch({**own(), "torch": "2.13.0+cpu"}, {**own(), "torch": "2.13.1+cu130"}) is None
    assert mismatch({**own(), "peft": "0.21.2"}, {**own(), "peft": "0.22.0"}) == "peft is 0.21.2 here and 0.22.0 there"
    assert "fedloom" in (mismatch(own(), {}) or "")


def test_without_the_engine_the_extra_is_named():
    table = Registry("part", "parts", {"x": "nvflare.no_such_module:x"})
    with pytest.raises(UserError, match=r"pip install 'fedloom\[distributed\]'"):
        table.get("x")


@pytest.mark.parametrize(("reason", "told"), [("lost", 4), ("crashed", 4), ("non_finite", 3)])
def test_a_client_whose_process_was_started_again_is_told_everything_again(
    tiny_recipe, tmp_path, monkeypatch, reason, told
):
    """The initial broadcast goes to each of three clients once, and again to one whose process lost it."""
    from fedloom.algorithms.averaging.fedavg import FedAvg
    from fedloom.runtimes.simulator import Simulator

    initial = []
    monkeypatch.setattr(
        FedAvg, "initial_payload", lambda self, client: initial.append(client) or self.round_payload(client)
    )
    play = Simulator.run

    def losing(self, assignments):
        for outcome in play(self, assignments):
            lost = outcome.client == "last" and outcome.round == 1 and "loss" in getattr(outcome, "metrics", {})
            yield Failure("last", 1, reason, "as this test wants it") if lost else outcome

    monkeypatch.setattr(Simulator, "run", losing)
    run(tiny_recipe({"evaluation.every": 0}), tmp_path / "run")
    assert len(initial) == told
    assert initial.count("last") == told - 2
