"""Every refusal applies to one recipe and to nothing else, and the simulator and sites refuse alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.experiment.prepare import prepare, settle
from fedloom.experiment.site_data import check
from fedloom.federation import checks
from fedloom.federation.checks.ignored import IGNORED, ignored
from fedloom.federation.runtime import Capabilities
from fedloom.federation.watch import Watch
from fedloom.federation.workplace import find_data
from fedloom.recipe.recipe import Recipe, section_of
from fedloom.runtimes.simulator import Simulator

SITES = ("copy", "last", "upper")
PRIVATE = {"privacy": {"noise": 1.0, "clip": 1.0}}
RANKS = {"runtime.ranks": 2}
FSDP = {**RANKS, "runtime.parallel": "fsdp"}
NO_ROOM = {"split.splitter": "uniform", "split.num_clients": 3}

#: Rule → the overrides of a recipe that trips it.
CASES = {
    "algorithm.method": {"algorithm": "fedit", "adapter": {"method": "ia3"}},
    "algorithm.two_factors": {"algorithm": "fedit", "adapter.dora": True},
    "algorithm.mixed_ranks": {"adapter.ranks": {"copy": 1}},
    "algorithm.dpo": {"algorithm": "fedot", "train.objective": "dpo"},
    "algorithm.quantization": {"algorithm": "flora", "model.quantization": "int8"},
    "algorithm.compile": {"algorithm": "flora", "train.compile": True},
    "algorithm.privacy": {"algorithm": "median", **PRIVATE},
    "ranks.runtime": {**RANKS, "runtime.name": "single"},
    "ranks.offsite": {**RANKS, "algorithm": "fedot"},
    "ranks.own_loop": {**RANKS, "algorithm": "walking"},
    "ranks.hooks": {**RANKS, "hooks": ["gradient_noise"], "train.accumulation": 2},
    "ranks.cache_prefix": {**RANKS, "train.cache_prefix": 8, "adapter.layers": "last-1"},
    "fsdp.weights": {**FSDP, "algorithm": "flora"},
    "fsdp.trains_base": {**FSDP, "adapter": {"method": "full"}},
    "fsdp.compile": {**FSDP, "train.compile": True},
    "fsdp.recomputed": {**FSDP, "train.checkpointing": True},
    "fsdp.quantization": {**FSDP, "model.quantization": "int8"},
    "runtime.offsite": {"algorithm": "fedot", "runtime.name": "moving"},
    "runtime.pooled": {"algorithm": "global", "runtime.name": "distributed"},
    "devices.missing": {"algorithm": "hetlora", "adapter.ranks": "by device"},
    "devices.real_time": {"devices": {}, "runtime.name": "distributed"},
    "devices.privacy": {"devices": {}, **PRIVATE},
    "devices.pooled": {"devices": {}, "algorithm": "global"},
    "devices.offsite": {"devices": {}, "algorithm": "fedot"},
    "devices.deadline": {"devices": {"deadline": 3.0}, "algorithm": "fedbuff"},
    "privacy.hooks": {**PRIVATE, "hooks": ["validation_loss"]},
    "evaluation.suite": {"evaluation.suite": "humaneval"},
    "cohort.recipe": {"train.cohort": 2, "adapter.dropout": 0.1},
    "ranks.one_gpu": {**RANKS, "runtime.device": "cuda:0"},
    "ranks.gpus": {**RANKS, "runtime.device": "cuda"},
    "clients.unknown_rank": {"algorithm": "hetlora", "adapter.ranks": {"copi": 1}},
    "clients.too_few": {"federation.clients_per_round": 4},
    "clients.buffer": {"algorithm": {"name": "fedbuff", "buffer": 4}},
    "clients.quorum": {"federation.min_clients": 4},
    "clients.private_quorum": {**PRIVATE, "federation.clients_per_round": 2, "federation.min_clients": 2},
    "room.clients": {**NO_ROOM, "devices": {"memory": {"median": 1e3}}},
    "room.coming": {**NO_ROOM, "devices": {"trace": "trace.csv"}},
    "room.sampled": {**NO_ROOM, "devices": {"trace": "trace.csv"}, "federation.clients_per_round": 3},
    "model.positions": {"adapter": {"method": "prompt_tuning"}, "data.max_length": 500},
    "model.packing": {"train.packing": "on"},
    "model.checkpointing": {
        "adapter": {"method": "prefix_tuning", "virtual_tokens": 2}, "train.packing": "off", "train.checkpointing": True,
    },
    "model.loss_chunk": {"train.loss_chunk": 8},
    "model.offload": {"train.optimizer_offload": "cpu"},
    "model.compile": {"train.compile": True},
    "model.cache_prefix": {"train.cache_prefix": 8},
    "model.cohort": {"train.cohort": 2, "federation.clients_per_round": 1},
}  # fmt: skip

TRACES = {
    "room.coming": "client,dropout\nclient-1,1\nclient-2,1\nclient-3,1\n",
    "room.sampled": "client,memory\nclient-1,1000\n",
}

#: Rules that a run between sites does not reach: another one applies first, the runtime is another, GPUs are a site's own.
ELSEWHERE = {
    "ranks.runtime": "", "runtime.offsite": "", "ranks.one_gpu": "", "ranks.gpus": "",
    "devices.privacy": "devices.real_time", "devices.pooled": "runtime.pooled", "devices.offsite": "devices.real_time",
    "devices.deadline": "devices.real_time", "cohort.recipe": "cohort.recipe",
}  # fmt: skip
EARLY = {rule.name for stage in ("recipe", "data") for rule in checks.STAGES[stage]}


class Walking(FedAvg):
    """A loop of its own, which does not say how ranks share it."""

    def local_training(self, run):
        return run.fit(self)


class Single(Simulator):
    """A runtime whose clients are single processes."""

    capabilities = Capabilities(virtual=True, pooled_tests=True)


class Moving(Simulator):
    """A runtime that moves clients between processes."""

    capabilities = Capabilities(virtual=True, pooled_tests=True, keeps_clients=False)


@pytest.fixture
def recipe(tiny_recipe, monkeypatch, tmp_path):
    """A function of a rule's name: the recipe that trips it, in surroundings that do."""
    monkeypatch.setitem(registry.algorithms._targets, "walking", Walking)
    monkeypatch.setitem(registry.runtimes._targets, "single", Single)
    monkeypatch.setitem(registry.runtimes._targets, "moving", Moving)

    def make(name: str, **more: object) -> Recipe:
        if name in ("ranks.one_gpu", "ranks.gpus"):
            monkeypatch.setattr("torch.cuda.is_available", lambda: True)
            monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        if name == "model.packing":
            monkeypatch.setattr("fedloom.federation.checks.model_rules.supports_packing", lambda model: False)
        if name == "model.loss_chunk":
            monkeypatch.setattr("fedloom.federation.checks.model_rules.supports_chunks", lambda model: False)
        if name == "model.compile":
            monkeypatch.setenv("CXX", str(tmp_path / "none"))
        if name in TRACES:
            (tmp_path / "trace.csv").write_text(TRACES[name])
            monkeypatch.chdir(tmp_path)
        return tiny_recipe({**CASES[name], **more})

    return make


class Fired(Exception):
    """The rules of one stage that apply."""


def applying(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All rules of the first stage in which any applies."""

    def record(rules, facts):
        ((stage, table),) = [(s, t) for s, t in checks.STAGES.items() if rules[0] in t]
        names = [rule.name for rule in table if rule.when(facts)]
        if names:
            raise Fired(stage, names)

    with monkeypatch.context() as patch:
        patch.setattr(checks, "refuse", record)
        with pytest.raises(Fired) as fired:
            prepare(recipe, Watch())
    stage, names = fired.value.args
    assert set(names) <= {rule.name for rule in checks.STAGES[stage]}
    return list(names)


def test_every_rule_has_a_case_and_a_name_of_its_own():
    names = [rule.name for table in checks.STAGES.values() for rule in table]
    assert len(names) == len(set(names))
    assert set(names) == set(CASES), "write the recipe that trips it into CASES"
    assert set(ELSEWHERE) <= EARLY


@pytest.mark.parametrize("name", CASES)
def test_a_rule_applies_to_its_recipe_alone(name, recipe, monkeypatch):
    made = recipe(name)
    assert applying(made, monkeypatch) == [name]
    with pytest.raises(UserError) as refused:
        prepare(made, Watch())
    sentence = str(refused.value)
    assert ": " in sentence, "what is wrong, and how to fix it"
    assert "None" not in sentence


def sentence(act) -> str:
    """What a check refuses with; the empty string where it does not."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def here(recipe: Recipe) -> None:
    checks.check_recipe(recipe)
    settle(recipe, find_data(recipe))


@pytest.mark.parametrize("name", sorted(EARLY - set(ELSEWHERE)))
def test_sites_refuse_what_the_simulator_refuses_by_the_same_sentence(name, recipe):
    made = recipe(name)
    found = sentence(lambda: check(made.with_values({"runtime.name": "distributed"}), SITES))
    assert found == sentence(lambda: prepare(made, Watch()))
    assert found


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_only_the_simulator_can_refuse_is_known(name, recipe, monkeypatch):
    made = recipe(name).with_values({"runtime.name": "distributed"})
    facts = checks.RecipeFacts(made)
    rules = {rule.name: rule for rule in checks.STAGES["recipe"]}
    found = sentence(lambda: check(made, SITES))
    expected = ELSEWHERE[name]
    assert found == (rules[expected].says(facts, rules[expected].when(facts)) if expected else "")


# ------------------------------------------------------------------ every setting

#: Settings that are no default, every key of a recipe at least once.
SETTINGS = [
    {"name": "other", "description": "words", "seed": 7},
    {"model.dtype": "bfloat16", "model.attention": "sdpa", "model.revision": "main", "model.trust_remote_code": True},
    {"model.quantization": "int8"},
    {"model.name": "random-tiny"},
    {"data.columns": {"output": "output"}, "data.license": "mine", "data.max_length": 64, "data.limit": 50},
    {"data.template": "alpaca", "data.system": "You are brief.", "split.by": "category", "split.test": 0.3},
    {"split.validation": 0.1, "split.min_size": 2},
    {"split.splitter": "uniform", "split.num_clients": 4},
    {"split.splitter": "dirichlet", "split.num_clients": 3, "split.alpha": 50.0},
    {"split.splitter": "shards", "split.num_clients": 3, "split.shards": 3},
    {"split.clusters": 2},
    {"adapter.rank": 4, "adapter.alpha": 8, "adapter.dropout": 0.1, "adapter.target_modules": ["q_proj"]},
    {"adapter.rslora": True, "adapter.dora": True, "adapter.layers": "last-1"},
    {"adapter.bias": "lora_only"},
    {"algorithm": "hetlora", "adapter.ranks": {"copy": 1}},
    {"adapter.method": "adalora", "adapter.orthogonality": 0.1},
    {
        "adapter.method": "ia3",
        "adapter.target_modules": ["k_proj", "down_proj"],
        "adapter.feedforward_modules": ["down_proj"],
    },
    {"adapter.method": "prompt_tuning", "adapter.virtual_tokens": 4, "adapter.init": "text", "adapter.init_text": "Hi"},
    {"adapter.method": "prefix_tuning", "adapter.prefix_projection": True, "adapter.encoder_hidden_size": 16},
    {"train.epochs": 1, "train.batch_size": 3, "train.accumulation": 2, "train.lr": 0.1, "train.optimizer": "sgd"},
    {"train.steps": 3, "train.betas": [0.8, 0.9], "train.eps": 1e-4, "train.weight_decay": 0.1, "train.clip": 2.0},
    {"train.optimizer": "sgd", "train.momentum": 0.5, "train.schedule": "cosine", "train.warmup": 0.1},
    {"train.optimizer_state": "keep", "train.optimizer_offload": "disk", "train.nonfinite": "skip"},
    {"train.packing": "off", "train.precision": "fp32", "train.checkpointing": True, "train.loss_chunk": 8},
    {"train.compile": True},
    {"train.cache_prefix": 8, "adapter.layers": "last-1"},
    {"train.cohort": "auto"},
    {"train.cohort": 2},
    {"federation.rounds": 3, "federation.clients_per_round": 2, "federation.min_clients": 2},
    {"federation.round_deadline": 60.0},
    {"operators.initial": ["bf16"], "operators.up": ["delta", "zstd"], "operators.down": ["fp16"]},
    {"runtime.name": "simulator", "runtime.device": "auto", "runtime.threads": 2},
    {"runtime.ranks": 2, "runtime.parallel": "fsdp"},
    {"runtime.speed_spread": 1.0},
    {"runtime.ray": {"actors": 3, "cpus": 2.0, "gpus": 0.5, "address": "auto"}},
    {"privacy": {"clip": 1.0, "noise": 1.0, "delta": 1e-5, "where": "client", "seeded": True, "population": 3}},
    {"privacy": {"clip": 1.0, "epsilon": 50.0, "adaptive": {"quantile": 0.4, "lr": 0.1, "noise": 30.0}}},
    {
        "devices": {
            "speed": {"median": 1e6, "spread": 1.0},
            "download": {"median": 1e3, "spread": 1.0},
            "available": 0.9,
        }
    },
    {"devices": {"upload": {"median": 1e3, "spread": 1.0}, "memory": {"median": 1e9, "spread": 1.0}, "dropout": 0.1}},
    {"devices": {"deadline": 1e3, "trace": "nowhere.csv"}},
    {"evaluation.every": 2, "evaluation.clients": 2, "evaluation.limit": 3, "evaluation.batch_size": 4},
    {"evaluation.suite": "skills", "evaluation.max_new_tokens": 3, "evaluation.answers": 3},
    {"tracking.trackers": ["tensorbord"]},
    {"tracking.keep_checkpoints": 3},
    {"hooks": ["ema"]},
    {"train.objective": "dpo", "train.dpo_beta": 0.2, "train.dpo_smoothing": 0.1, "data.path": "nowhere.jsonl"},
    {"data.corpus": "fed-skils", "data.path": None},
    # more that is wrong
    {"algorithm": "fedagv"},
    {"algorithm.weigth_by": "tokens"},
    {"algorithm": {"name": "fedrep"}, "train.steps": 1},
    {"operators.down": ["delta"]},
    {"operators.up": ["delta"], **PRIVATE},
    {"operators.up": [{"name": "sparsify", "ratio": 0.1}], **PRIVATE},
    {"operators.up": ["zsdt"]},
    {"hooks": ["emma"]},
    {"hooks": [{"name": "ema", "decey": 0.9}]},
    {"evaluation.suite": "skils"},
    {"evaluation.clients": 9},
    {"split.splitter": "dirichelt"},
    {"runtime.device": "tpu9000"},
    {"privacy": {"noise": 1.0, "delta": 0.4}},
    {"privacy": {"noise": 1.0, "epsilon": 2.0}},
    {"privacy": {"noise": 1.0, "adaptive": {"noise": 0.4}}},
]

#: What only a simulation or only sites can say: key → words of the sites' sentence, empty where sites take it.
DIFFERENT = {
    "devices": "time is real with runtime.name=distributed",
    "train.cohort": "has its clients in processes of their own",
    "data.path": "",  # each site looks for its own
}


def leaves(section, prefix=""):
    """Every key of a recipe that holds a value."""
    for name, info in section.model_fields.items():
        inner = section_of(info.annotation)
        yield from leaves(inner, f"{prefix}{name}.") if inner else [prefix + name]


def set_by(overrides, prefix=""):
    """The keys that overrides set, those of nested mappings too."""
    for key, value in overrides.items():
        nested = isinstance(value, dict) and f"{prefix}{key}" not in set(leaves(Recipe))
        yield from set_by(value, f"{prefix}{key}.") if nested else [prefix + key]


def test_every_key_of_a_recipe_is_tried_between_sites():
    tried = {key for overrides in SETTINGS for key in set_by(overrides)}
    missing = set(leaves(Recipe)) - tried - {"algorithm.name"}
    assert not missing, "add them to SETTINGS, with values that are no default"
    assert set(IGNORED) <= tried


@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda o: ",".join(o))
def test_the_simulator_and_sites_give_the_same_answer_to_a_setting(overrides, tiny_recipe):
    made = tiny_recipe(overrides)
    sites = made.with_values({"runtime.name": "distributed"})
    found = sentence(lambda: check(sites, SITES))
    different = [words for key, words in DIFFERENT.items() if any(k.startswith(key) for k in overrides)]
    if different and overrides.get("train.cohort") != "auto" and "data.corpus" not in overrides:
        assert different[0] in found
        assert bool(different[0]) == bool(found)
    else:
        assert found == sentence(lambda: here(made))
    said = ignored(sites)
    unheeded = {k for k in set_by(overrides) if k in IGNORED} | {"split.splitter", "data.path"}
    if made.data.path is None:
        unheeded -= {"data.path"}
    assert {text.partition("=")[0] for text in said} == unheeded, "tiny_recipe itself sets the last two"
    assert all(text.startswith(("data.", "split.")) or text in ignored(sites, dealt=True) for text in said)


# ------------------------------------------------------------------ before anything starts


class Kit:
    """A server's kit that must not be touched."""

    def __init__(self, folder: Path) -> None:
        self.kit = folder
        self.project = type("Project", (), {"clients": dict.fromkeys(SITES, "")})


def test_a_server_refuses_another_recipe_on_resume_before_it_starts(tiny_recipe, tmp_path):
    from fedloom.experiment.run import run
    from fedloom.federation.record.run_folder import RunFolder

    serve = pytest.importorskip("fedloom.experiment.sites", exc_type=ImportError).serve
    recipe = tiny_recipe({"runtime.name": "distributed"})
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").write_recipe(recipe)
    (tmp_path / "run" / "checkpoints" / "round-00002").mkdir(parents=True)
    for overrides, words in [
        ({"train.lr": 0.5}, "train.lr is 0.01 in the run and cannot become 0.5"),
        ({"federation.rounds": 1}, "federation.rounds=1 but 2 rounds are finished"),
    ]:
        other = recipe.with_values(overrides)
        how = {"resume": True, "overwrite": False, "watch": Watch()}
        between_sites = sentence(lambda: serve(Kit(tmp_path / "kit"), other, tmp_path / "run", wait=None, **how))  # noqa: B023
        simulated = other.with_values({"runtime.name": "simulator"})
        assert words in between_sites
        assert between_sites == sentence(lambda: run(simulated, tmp_path / "run", resume=True))  # noqa: B023
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize("name", ["devices.real_time", "clients.too_few", "clients.unknown_rank"])
def test_a_server_refuses_before_it_writes_anything(name, recipe, tmp_path):
    serve = pytest.importorskip("fedloom.experiment.sites", exc_type=ImportError).serve
    made = recipe(name).with_values({"runtime.name": "distributed"})
    with pytest.raises(UserError):
        serve(Kit(tmp_path / "kit"), made, tmp_path / "run", resume=False, overwrite=False, watch=Watch(), wait=None)
    assert not (tmp_path / "kit").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("late", [False, True])
def test_a_refused_federation_leaves_the_one_that_it_was_to_replace(late, tiny_recipe, tmp_path, monkeypatch):
    local_sites = pytest.importorskip("fedloom.experiment.local_sites", exc_type=ImportError)
    from fedloom.federation.record.run_folder import RunFolder

    recipe = tiny_recipe({"runtime.name": "distributed"})
    out = tmp_path / "run"
    kept = out / "federation" / "kits" / "copy" / "state"
    kept.parent.mkdir(parents=True)
    kept.write_text("rounds of work")
    RunFolder(out).write_recipe(recipe)

    def provision(project, kits):
        assert not kept.exists(), "a new federation is made in an empty folder"
        kits.mkdir()
        raise UserError("the model does not fit: take another")

    monkeypatch.setattr(local_sites, "provision", provision)
    wrong = recipe if late else recipe.with_values({"tracking.trackers": ["tensorbord"]})
    with pytest.raises(UserError, match="does not fit" if late else "tensorbord"):
        local_sites.run_here(wrong, out, False, True, Watch())
    assert kept.read_text() == "rounds of work"
    assert sorted(p.name for p in (out / "federation").iterdir()) == ["kits"]
