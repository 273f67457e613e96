"""The recipe's schema: every key that a recipe may have, its default, its range and one line about it.

A recipe is frozen. Unknown keys are refused with the nearest valid one; the resolved recipe writes every default out.
The field descriptions below are the help: `docs/recipes.md` is generated from them. This file does not know what any
algorithm or corpus does; their own options are checked where they are looked up (experiment/run.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fedloom.common.complaints import first_complaint
from fedloom.common.errors import UserError, suggest
from fedloom.common.yaml import dump_yaml, load_yaml
from fedloom.recipe.adapter import AdapterConfig
from fedloom.recipe.devices import DevicesConfig
from fedloom.recipe.library import builtin_recipes, find_recipe, recipes_folder
from fedloom.recipe.overrides import nearest_key, nested_copy, set_dotted
from fedloom.recipe.privacy import PrivacyConfig
from fedloom.recipe.sections import (
    AlgorithmConfig,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    HookConfig,
    ModelConfig,
    OperatorConfig,
    OperatorsConfig,
    RayConfig,
    RuntimeConfig,
    Section,
    SplitConfig,
    TrackingConfig,
    named_items,
)
from fedloom.recipe.train import TrainConfig

#: The sections stand in files of their own and are imported from here.
__all__ = [
    "AdapterConfig",
    "AlgorithmConfig",
    "DataConfig",
    "DevicesConfig",
    "EvaluationConfig",
    "FederationConfig",
    "HookConfig",
    "ModelConfig",
    "OperatorConfig",
    "OperatorsConfig",
    "PrivacyConfig",
    "RayConfig",
    "Recipe",
    "RuntimeConfig",
    "SplitConfig",
    "TrackingConfig",
    "TrainConfig",
    "builtin_recipes",
    "find_recipe",
    "recipes_folder",
    "section_of",
]


class Recipe(Section):
    """A whole run, frozen. `Recipe.load` reads one; `resolved()` writes every default out."""

    name: str = Field("", description="the run's name; the recipe's file name where it is empty")
    description: str = Field("", description="what this recipe shows")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the base model; a bare string is its name")
    data: DataConfig = Field(default_factory=lambda: DataConfig(corpus="fed-skills"), description="the corpus")
    split: SplitConfig = Field(default_factory=SplitConfig, description="how the corpus is split among clients")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="the trainable part of the model")
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig, description="the federated algorithm")
    train: TrainConfig = Field(default_factory=lambda: TrainConfig(steps=8), description="a client's local training")
    federation: FederationConfig = Field(default_factory=FederationConfig, description="rounds and sampling")
    operators: OperatorsConfig = Field(
        default_factory=OperatorsConfig, description="message operators (docs/operators.md)"
    )
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="where the clients run")
    privacy: PrivacyConfig | None = Field(None, description="clipping, noise and an accountant; null: none of them")
    devices: DevicesConfig | None = Field(
        None, description="what simulated clients run on (docs/devices.md); null: all alike and always there"
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="what is measured, and when")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="events, checkpoints and trackers")
    hooks: list[HookConfig] = Field(
        default_factory=list, description="hooks by name, with their own options beside it (docs/trainer.md)"
    )
    seed: int = Field(42, ge=0, description="all randomness follows from it")

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("algorithm", mode="before")
    @classmethod
    def _algorithm_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("hooks", mode="before")
    @classmethod
    def _hooks_by_name(cls, value: Any) -> Any:
        return named_items(value)

    @model_validator(mode="after")
    def _each_hook_once(self) -> Recipe:
        names = [h.name for h in self.hooks]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            raise ValueError(f"hooks has {twice} twice: name each hook once")
        return self

    @model_validator(mode="after")
    def _base_can_train(self) -> Recipe:
        """Weights of the base that train are windows into the adapter's fp32 buffer."""
        if self.adapter.trains_base and self.model.dtype != "float32":
            raise ValueError(
                f"adapter.{self.adapter.trains_base} trains weights of the base, which have to be float32, "
                f"but model.dtype={self.model.dtype}: set model.dtype=float32"
            )
        asked = "dora=true needs each weight's norm" if self.adapter.dora else ""
        asked = f"{self.adapter.trains_base} trains weights of the base" if self.adapter.trains_base else asked
        if asked and self.model.quantization:
            raise ValueError(
                f"adapter.{asked}, but model.quantization={self.model.quantization} keeps them in a few bits: leave one of "
                "them out"
            )
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
        """A recipe from nested values and dotted overrides (``{"train.lr": 1e-3}``). Raises UserError."""
        merged = nested_copy(values)
        _leave_other_methods(merged, (overrides or {}).get("adapter.method"))
        both = [k for k in ("train.steps", "train.epochs") if (overrides or {}).get(k) is not None]
        if len(both) == 2:
            raise UserError(f"{both[0]} and {both[1]} both say how long a client trains: keep one")
        for dotted, value in (overrides or {}).items():
            set_dotted(merged, dotted, nested_copy(value) if isinstance(value, Mapping) else value)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise UserError(_one_sentence(error)) from None

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """A built-in recipe by name, or a YAML file. Raises UserError where there is none or it is wrong."""
        path = find_recipe(source)
        try:
            values = load_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = " ".join(str(error).split())
            raise UserError(f"recipe {path} is not YAML: {where}") from None
        if not isinstance(values, dict):
            raise UserError(
                f"recipe {path} holds {type(values).__name__}, not a mapping of sections: see `fedloom recipes`"
            )
        if not values.get("name"):
            values["name"] = path.stem
        return cls.parse(values, overrides)

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain JSON values with every default written out."""
        return self.model_dump(mode="json")

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, validated again."""
        return Recipe.parse(self.resolved(), values)

    def with_hook(self, name: str, **options: Any) -> Recipe:
        """A copy with this hook in it; one that is there already is replaced, where it stands. Raises UserError."""
        added = {"name": name, **options}
        kept = [added if h.name == name else h.model_dump(mode="json") for h in self.hooks]
        return self.with_values({"hooks": kept if added in kept else [*kept, added]})

    def without_hook(self, name: str) -> Recipe:
        """A copy without this hook. Raises UserError where it is not there."""
        if name not in [h.name for h in self.hooks]:
            raise UserError(
                f"the recipe has no hook {name!r} to leave out: {suggest(name, [h.name for h in self.hooks])}"
            )
        return self.with_values({"hooks": [h.model_dump(mode="json") for h in self.hooks if h.name != name]})

    def to_yaml(self) -> str:
        return dump_yaml(self.resolved())


def _leave_other_methods(values: dict[str, Any], method: Any) -> None:
    """An override of adapter.method starts from that method's defaults: the keys beside another one are left behind."""
    adapter = values.get("adapter")
    if method is not None and isinstance(adapter, dict) and adapter.get("method", "lora") != method:
        values["adapter"] = {}


def _valid_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        inner = section_of(info.annotation)
        if inner is not None:
            keys += _valid_keys(inner, f"{prefix}{name}.")
    return keys


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section behind a field's type, one that may be null too; None where the field is a plain value."""
    either = get_args(annotation) if get_origin(annotation) in {Union, UnionType} else ()
    options = [o for o in (annotation, *either) if isinstance(o, type) and issubclass(o, BaseModel)]
    return options[0] if options else None


def _one_sentence(error: ValidationError) -> str:
    """Pydantic's first complaint as one sentence with the key, the value and the mend."""
    complaint = first_complaint(error)
    if complaint.unknown:
        return f"unknown key {complaint.key} in the recipe: {nearest_key(complaint.key, _valid_keys(Recipe))}"
    return complaint.of()
