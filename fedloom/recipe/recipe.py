"""The recipe's schema: every key, with its default, its range and its description.

A recipe is frozen. Unknown keys are refused with the nearest valid one; the resolved recipe contains every default.
`docs/recipes.md` is generated from the field descriptions. This file does not know what an algorithm or corpus does;
their own options are checked where they are looked up.
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
    parse_named_items,
)
from fedloom.recipe.train import TrainConfig

#: The sections are in their own files and are imported from here.
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
    """The recipe of a whole run, frozen. `Recipe.load` reads one; `resolved()` contains every default."""

    name: str = Field("", description="the run's name; if empty, the name of the recipe's file")
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
        None, description="devices of simulated clients (docs/devices.md); null: all equal and always available"
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="what is evaluated, and when")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="events, checkpoints and trackers")
    hooks: list[HookConfig] = Field(
        default_factory=list, description="hooks by name, each with its options (docs/trainer.md)"
    )
    seed: int = Field(42, ge=0, description="the seed of all random draws")

    @field_validator("model", mode="before")
    @classmethod
    def _parse_model(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("algorithm", mode="before")
    @classmethod
    def _parse_algorithm(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("hooks", mode="before")
    @classmethod
    def _parse_hooks(cls, value: Any) -> Any:
        return parse_named_items(value)

    @model_validator(mode="after")
    def _check_hooks_once(self) -> Recipe:
        names = [h.name for h in self.hooks]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            raise ValueError(f"hooks has {twice} twice: name each hook once")
        return self

    @model_validator(mode="after")
    def _check_base_can_train(self) -> Recipe:
        """Check dtype and quantisation: weights of the base that train are windows into the adapter's fp32 buffer."""
        if self.adapter.trains_base and self.model.dtype != "float32":
            raise ValueError(
                f"adapter.{self.adapter.trains_base} trains weights of the base, which must be float32, "
                f"but model.dtype={self.model.dtype}: set model.dtype=float32"
            )
        asked = "dora=true needs each weight's norm" if self.adapter.dora else ""
        asked = f"{self.adapter.trains_base} trains weights of the base" if self.adapter.trains_base else asked
        if asked and self.model.quantization:
            raise ValueError(
                f"adapter.{asked}, but model.quantization={self.model.quantization} quantises them: leave one of them "
                "out"
            )
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Build a recipe from nested values and dotted overrides (``{"train.lr": 1e-3}``). Raises UserError."""
        merged = nested_copy(values)
        _drop_other_methods(merged, (overrides or {}).get("adapter.method"))
        both = [k for k in ("train.steps", "train.epochs") if (overrides or {}).get(k) is not None]
        if len(both) == 2:
            raise UserError(f"{both[0]} and {both[1]} both set how long a client trains: keep one")
        for dotted, value in (overrides or {}).items():
            set_dotted(merged, dotted, nested_copy(value) if isinstance(value, Mapping) else value)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise UserError(_describe_error(error)) from None

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Load a built-in recipe by name, or a YAML file. Raises UserError if it does not exist or is invalid."""
        path = find_recipe(source)
        try:
            values = load_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = " ".join(str(error).split())
            raise UserError(f"recipe {path} is not YAML: {where}") from None
        if not isinstance(values, dict):
            raise UserError(
                f"recipe {path} is a {type(values).__name__}, but must be a mapping of sections: see `fedloom recipes`"
            )
        if not values.get("name"):
            values["name"] = path.stem
        return cls.parse(values, overrides)

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values with every default."""
        return self.model_dump(mode="json")

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """Return a copy with dotted keys replaced, validated again."""
        return Recipe.parse(self.resolved(), values)

    def with_hook(self, name: str, **options: Any) -> Recipe:
        """Return a copy with this hook; a hook of the same name is replaced in its place. Raises UserError."""
        added = {"name": name, **options}
        kept = [added if h.name == name else h.model_dump(mode="json") for h in self.hooks]
        return self.with_values({"hooks": kept if added in kept else [*kept, added]})

    def without_hook(self, name: str) -> Recipe:
        """Return a copy without this hook. Raises UserError if the recipe does not have it."""
        if name not in [h.name for h in self.hooks]:
            raise UserError(
                f"the recipe has no hook {name!r} to leave out: {suggest(name, [h.name for h in self.hooks])}"
            )
        return self.with_values({"hooks": [h.model_dump(mode="json") for h in self.hooks if h.name != name]})

    def to_yaml(self) -> str:
        return dump_yaml(self.resolved())


def _drop_other_methods(values: dict[str, Any], method: Any) -> None:
    """Drop the keys of another method, so that an override of adapter.method starts from its method's defaults."""
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
    """Return the section of a field's type, also of one that may be null; None if the field is a plain value."""
    either = get_args(annotation) if get_origin(annotation) in {Union, UnionType} else ()
    options = [o for o in (annotation, *either) if isinstance(o, type) and issubclass(o, BaseModel)]
    return options[0] if options else None


def _describe_error(error: ValidationError) -> str:
    """Pydantic's first error as one sentence with the key, the value and how to fix it."""
    complaint = first_complaint(error)
    if complaint.unknown:
        return f"unknown key {complaint.key} in the recipe: {nearest_key(complaint.key, _valid_keys(Recipe))}"
    return complaint.of()
