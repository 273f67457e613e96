"""The recipe: what is read, what is refused and with which sentence, and that a resolved one reads back the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.common.complaints import parse_options
from fedloom.common.errors import UserError, suggest
from fedloom.common.yaml import load_yaml
from fedloom.recipe.library import builtin_recipes, find_recipe
from fedloom.recipe.overrides import parse_overrides
from fedloom.recipe.recipe import Recipe

# ------------------------------------------------------------------ shipped recipes


@pytest.mark.parametrize("path", builtin_recipes().values(), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_says_what_it_shows(path):
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    assert recipe.description
    head = path.read_text(encoding="utf-8").splitlines()
    assert head[0].startswith("#"), "a recipe is headed by what it shows and how long it takes"
    assert Recipe.load(path.stem) == recipe
    assert Recipe.parse(recipe.resolved()) == recipe


def test_the_quickstart_is_there_and_is_the_documented_one():
    quickstart = Recipe.load("quickstart")
    assert (quickstart.model.name, quickstart.data.corpus) == ("smollm2-135m", "fed-skills")
    assert (quickstart.algorithm.name, quickstart.adapter.method) == ("fedavg", "lora")


# ------------------------------------------------------------------ reading


def test_an_empty_recipe_has_every_default():
    resolved = Recipe.parse({}).resolved()
    assert resolved["seed"] == 42
    assert resolved["train"]["steps"] == 8
    assert resolved["train"]["epochs"] is None
    assert resolved["data"]["corpus"] == "fed-skills"
    json.dumps(resolved, allow_nan=False)


def test_resolved_recipes_read_back_the_same(tiny_recipe):
    recipes = [
        Recipe.parse({}),
        tiny_recipe(),
        tiny_recipe({"train.epochs": 2, "train.clip": None, "federation.clients_per_round": 0.5}),
        tiny_recipe({"algorithm": "fedavg", "algorithm.weight_by": "tokens"}, seed=7),
        tiny_recipe({"data.columns": {"output": "answer"}, "adapter.target_modules": ["q_proj", "v_proj"]}),
    ]
    for recipe in recipes:
        assert Recipe.parse(recipe.resolved()) == recipe
        assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
        assert Recipe.parse(json.loads(json.dumps(recipe.resolved()))) == recipe


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(0, 1e3, allow_subnormal=False),
    eps=st.floats(1e-12, 1.0),
    fraction=st.one_of(st.none(), st.integers(1, 50), st.floats(0.001, 0.999)),
    name=st.text(st.characters(codec="utf-8", categories=["L", "Zs", "Po"]), max_size=12).filter(lambda s: s.strip()),
)
def test_numbers_survive_the_round_trip_to_yaml_bit_for_bit(lr, eps, fraction, name):
    values = {"train.lr": lr, "train.eps": eps, "federation.clients_per_round": fraction, "description": f"a {name}"}
    recipe = Recipe.parse({}, values)
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    assert (recipe.train.lr, recipe.train.eps) == (lr, eps)


@pytest.mark.parametrize("name", ["1e3", "2.5", "3.10"])
def test_a_name_that_looks_like_a_number_stays_a_name(name):
    recipe = Recipe.parse({"name": name})
    assert recipe.name == name
    assert Recipe.parse(load_yaml(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3", "+1e-3"])
def test_a_number_is_a_number_however_yaml_reads_it(text):
    assert Recipe.parse(yaml.safe_load(f"train: {{lr: {text}}}")).train.lr == 1e-3
    assert Recipe.parse({}, parse_overrides([f"train.lr={text}"])).train.lr == 1e-3


def test_a_recipe_without_a_name_takes_its_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {lr: 1e-2}\n")
    assert Recipe.load(tmp_path / "mine.yaml").name == "mine"
    assert Recipe.load(str(tmp_path / "mine.yaml"), {"name": "other"}).name == "other"


def test_bare_strings_stand_for_a_name():
    recipe = Recipe.parse({"model": "some/model", "algorithm": "local"})
    assert (recipe.model.name, recipe.algorithm.name) == ("some/model", "local")
    assert recipe.model.dtype == "float32"
    changed = Recipe.parse({"model": "some/model"}, {"model.dtype": "bfloat16"})
    assert (changed.model.name, changed.model.dtype) == ("some/model", "bfloat16")
    kept = Recipe.parse({"model": {"name": "a", "dtype": "bfloat16"}}, {"model": "b"})
    assert (kept.model.name, kept.model.dtype) == ("b", "bfloat16")


def test_an_algorithms_options_stand_beside_its_name():
    recipe = Recipe.parse({"algorithm": {"name": "fedavg", "weight_by": "tokens"}})
    assert recipe.algorithm.options == {"weight_by": "tokens"}
    assert parse_options(FedAvg.Options, recipe.algorithm.options, "fedavg", "algorithm.").weight_by == "tokens"
    assert recipe.resolved()["algorithm"] == {"name": "fedavg", "weight_by": "tokens"}


# ------------------------------------------------------------------ overrides


def test_dotted_overrides_replace_what_the_recipe_says():
    recipe = Recipe.load("quickstart", {"train.lr": 0.5, "federation.rounds": 1, "seed": 7, "evaluation.suite": None})
    assert (recipe.train.lr, recipe.federation.rounds, recipe.seed, recipe.evaluation.suite) == (0.5, 1, 7, None)
    assert recipe.train.batch_size == Recipe.load("quickstart").train.batch_size


def test_overrides_from_a_command_line():
    values = parse_overrides(
        ["train.lr=1e-3", "data.path=null", "tracking.trackers=[tensorboard]", "name=a b", "train.betas=[0.8, 0.9]"]
    )
    assert values == {
        "train.lr": 1e-3,
        "data.path": None,
        "tracking.trackers": ["tensorboard"],
        "name": "a b",
        "train.betas": [0.8, 0.9],
    }
    assert parse_overrides(["description=a=b"]) == {"description": "a=b"}


@pytest.mark.parametrize("argument", ["train.lr", "=3", "train.betas=[0.9"])
def test_what_is_no_override_is_refused(argument):
    with pytest.raises(UserError, match="cannot read"):
        parse_overrides([argument])


def test_overrides_do_not_touch_what_they_are_given():
    values = {"train": {"lr": 0.1}}
    Recipe.parse(values, {"train.lr": 0.2, "model.dtype": "float16"})
    assert values == {"train": {"lr": 0.1}}


def test_steps_and_epochs_replace_each_other_from_outside_but_not_within():
    assert Recipe.parse({"train": {"epochs": 2}}).train.steps is None
    changed = Recipe.parse({"train": {"epochs": 2}}, {"train.steps": 5}).train
    assert (changed.steps, changed.epochs) == (5, None)
    changed = Recipe.parse({"train": {"steps": 5}}, {"train.epochs": 2}).train
    assert (changed.steps, changed.epochs) == (None, 2)
    assert Recipe.parse(Recipe.parse({"train": {"epochs": 2}}).resolved()).train.epochs == 2
    with pytest.raises(UserError, match=r"train\.steps.*train\.epochs.*keep one"):
        Recipe.parse({"train": {"steps": 5, "epochs": 2}})


def test_with_values_is_a_new_recipe():
    recipe = Recipe.parse({})
    changed = recipe.with_values({"train.lr": 0.5})
    assert (recipe.train.lr, changed.train.lr) == (1e-3, 0.5)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"train": {"learning_rat": 1}}, "train.learning_rat", "train.lr"),
        ({"train": {"batchsize": 1}}, "train.batchsize", "train.batch_size"),
        ({"trian": {"lr": 1}}, "trian", "train"),
        ({"federation": {"round": 1}}, "federation.round", "federation.rounds"),
        ({"adapter": {"r": 8}}, "adapter.r", "adapter.rank"),
        ({"seeed": 1}, "seeed", "seed"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(values, key, nearest):
    with pytest.raises(UserError) as caught:
        Recipe.parse(values)
    assert f"unknown key {key} " in str(caught.value)
    assert f"did you mean {nearest}?" in str(caught.value)


def test_a_key_like_no_other_is_refused_with_its_sections():
    with pytest.raises(UserError, match=r"unknown key split\.zzzzz .*valid keys are .*split\.alpha"):
        Recipe.parse({"split": {"zzzzz": 1}})


@pytest.mark.parametrize(
    "values",
    [
        {"train.lr": -1},
        {"train.lr": "fast"},
        {"train.lr": float("nan")},
        {"train.steps": 0},
        {"train.steps": 1.5},
        {"train.clip": 0},
        {"train.optimizer": "adam"},
        {"train.betas": [0.9, 1.0]},
        {"split.alpha": 0},
        {"split.alpha": -1},
        {"split.num_clients": 0},
        {"federation.clients_per_round": 0},
        {"federation.clients_per_round": 2.5},
        {"federation.rounds": 0},
        {"adapter.rank": 0},
        {"adapter.method": "prefix"},
        {"data.max_length": 1},
        {"data": {"corpus": None}},
        {"split.test": 1.0},
        {"split": {"validation": 0.5, "test": 0.5}},
        {"seed": -1},
        {"model.dtype": "int8"},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_one_sentence(values):
    with pytest.raises(UserError) as caught:
        Recipe.parse({}, values)
    said = str(caught.value)
    assert "\n" not in said
    assert "validation error" not in said.lower()
    assert any(key.rpartition(".")[2] in said or key in said for key in values)


def test_a_value_set_below_a_value_is_refused():
    with pytest.raises(UserError, match=r"cannot set seed\.x: seed is 3"):
        Recipe.parse({"seed": 3}, {"seed.x": 1})


def test_a_recipe_is_frozen():
    recipe = Recipe.parse({})
    with pytest.raises(ValidationError):
        recipe.seed = 1
    with pytest.raises(ValidationError):
        recipe.train.lr = 1.0


@pytest.mark.parametrize(("content", "said"), [("[1, 2]", "is a list"), ("", "is a NoneType"), ("a: [", "is not YAML")])
def test_a_file_that_is_no_recipe(tmp_path, content, said):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=said):
        Recipe.load(tmp_path / "bad.yaml")


def test_a_recipe_that_is_not_there():
    with pytest.raises(UserError, match="did you mean quickstart"):
        find_recipe("quickstrat")
    with pytest.raises(UserError, match="no recipe file"):
        find_recipe(Path("nowhere/mine.yaml"))


def test_an_unknown_option_of_an_algorithm_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown option algorithm\.weigth_by of fedavg: .*algorithm\.weight_by"):
        parse_options(FedAvg.Options, {"weigth_by": "tokens"}, "fedavg", "algorithm.")
    with pytest.raises(UserError, match=r"algorithm\.weight_by='words' is not valid for fedavg"):
        parse_options(FedAvg.Options, {"weight_by": "words"}, "fedavg", "algorithm.")


def test_suggestions():
    assert suggest("fedagv", ["fedavg", "local"]) == "did you mean fedavg?"
    assert suggest("zzz", ["b", "a"]) == "valid names are a, b"
    assert suggest("zzz", []) == "there are none"


def test_overrides_are_not_written_into():
    section = {"rounds": 2}
    overrides = {"federation": section, "federation.min_clients": 3}
    assert Recipe.parse({}, overrides).federation.min_clients == 3
    assert section == {"rounds": 2}
