"""The recipe's schema: every key that a recipe may have, its default, its range and one line about it.

A recipe is frozen. Unknown keys are refused with the nearest valid one; the resolved recipe writes every default out.
The field descriptions below are the help: `docs/recipes.md` is generated from them. This file does not know what any
algorithm or corpus does; their own options are checked where they are looked up (experiment.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedloom.errors import UserError, suggest
from fedloom.methods import AdapterConfig as AdapterConfig  # noqa: PLC0414  (importable from here)
from fedloom.overrides import dump_yaml, load_yaml, nearest_key, nested_copy, set_dotted
from fedloom.privacy import PrivacyConfig as PrivacyConfig  # noqa: PLC0414  (importable from here)
from fedloom.section import Fraction, Section


class ModelConfig(Section):
    name: str = Field("smollm2-135m", description="a built-in name, a folder, or a hub id of a causal language model")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the frozen base weights; the adapter is always float32"
    )
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    trust_remote_code: bool = Field(False, description="run code that a hub repository ships; off unless you ask")


class DataConfig(Section):
    corpus: str | None = Field(None, description="a corpus by name; null with `path` set uses your own file or hub id")
    path: str | None = Field(
        None, description="a .json, .jsonl, .csv or .parquet file (.gz too), a folder of them, or a hub id"
    )
    columns: dict[Literal["instruction", "input", "output", "category", "rejected"], str] | None = Field(
        None, description="which column of your data plays which role, e.g. {instruction: question, output: answer}"
    )
    license: str | None = Field(None, description="the licence of your own data, written into the summary")
    max_length: int = Field(512, ge=8, description="tokens a sequence may have; longer ones are truncated and counted")
    limit: int | None = Field(
        None, ge=1, description="use at most this many examples, drawn at random with the seed (all categories alike)"
    )
    template: Literal["auto", "chat", "alpaca", "plain"] = Field(
        "auto",
        description="how a prompt is written: the model's chat template, Alpaca's, or the bare text; "
        "auto takes chat where the tokenizer has a template and alpaca elsewhere",
    )
    system: str | None = Field(
        None, description="the system message under the chat template; null leaves it to the model's template"
    )

    @model_validator(mode="after")
    def _some_source(self) -> DataConfig:
        if self.corpus is None and self.path is None:
            raise ValueError("data needs a corpus or a path: set data.corpus=fed-skills or data.path=FILE")
        return self


class SplitConfig(Section):
    splitter: str | None = Field(
        None, description="uniform, dirichlet, meta, quantity, shards or natural; null: the corpus's own"
    )
    by: str = Field("category", description="the column that all but uniform and quantity go by")
    clusters: int | None = Field(
        None, ge=2, description="so many groups of texts with the same words take the place of the column `by`"
    )
    alpha: float | None = Field(
        None, gt=0, description="concentration of dirichlet and quantity, which need it: small is skewed, large is even"
    )
    shards: int = Field(2, ge=1, description="how many shards each client gets under shards")
    num_clients: int | None = Field(
        None, ge=1, description="number of clients; null: the corpus's default, under meta one for each value"
    )
    min_size: int = Field(
        1,
        ge=1,
        description="the fewest training examples a client may end with; a split that cannot keep it is refused",
    )
    validation: Fraction = Field(0.05, description="share of each client's examples held out for validation")
    test: Fraction = Field(0.1, description="share of each client's examples held out for the test")

    @model_validator(mode="after")
    def _room_for_training(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"split.validation + split.test = {self.validation + self.test:g} leaves nothing to train on: "
                "keep their sum under 1"
            )
        return self


class AlgorithmConfig(Section):
    """`name`, and beside it the algorithm's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("fedavg", description="the federated algorithm; its own options stand beside its name")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TrainConfig(Section):
    steps: int | None = Field(
        None, ge=1, description="optimiser steps of a client in a round (8 where neither steps nor epochs is given)"
    )
    epochs: int | None = Field(None, ge=1, description="passes over a client's own data in a round, instead of steps")
    batch_size: int = Field(8, ge=1, description="examples in one forward pass")
    accumulation: int = Field(1, ge=1, description="forward passes summed into one optimiser step")
    objective: Literal["sft", "dpo"] = Field(
        "sft",
        description="sft: learn the answers; dpo: prefer each answer to the rejected one beside it, for data that have both",
    )
    dpo_beta: float = Field(
        0.1, gt=0, description="dpo: β, how much a change against the base counts; large keeps the model near it"
    )
    dpo_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo: the share of pairs taken to be labelled the wrong way round"
    )
    lr: float = Field(1e-3, ge=0, description="peak learning rate")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="the client's optimiser")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.99), description="AdamW's β1, β2")
    eps: float = Field(1e-8, gt=0, description="AdamW's ε")
    momentum: Fraction = Field(0.0, description="SGD's momentum")
    weight_decay: float = Field(0.0, ge=0, description="decoupled under adamw, L2 under sgd")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="the learning rate over the whole run, rounds included; linear and cosine end at 0"
    )
    warmup: Fraction = Field(0.0, description="share of the whole run over which the learning rate rises from 0")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a step's gradient; null does not clip")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="whether a client's optimiser starts afresh in each round or goes on from its last one"
    )
    nonfinite: Literal["fail", "skip"] = Field(
        "fail", description="a loss or gradient that is not finite: fail the client, or skip the step and count it"
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto", description="padding-free batches; auto tries the model once and falls back to padding"
    )
    cohort: Literal["off", "auto"] | int = Field(
        "off",
        description="clients that train together in one pass over the base, in the simulator with LoRA: off, how many, "
        "or auto, which measures some numbers on the recipe's own batches",
    )

    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32",
        description="of matrix products in training; what trains and the loss stay fp32. auto takes bf16 where the device "
        "is faster in it",
    )
    checkpointing: bool = Field(
        False,
        description="keep each layer's input alone and compute the rest again in backward: less memory, more time",
    )
    loss_chunk: int | None = Field(
        None,
        ge=1,
        description="make the logits of so many supervised tokens at a time and again in backward, so that a large "
        "vocabulary's are never all there; null makes them at once",
    )

    @field_validator("packing", mode="before")
    @classmethod
    def _on_and_off(cls, value: Any) -> Any:
        """YAML 1.1 reads on and off as booleans."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("cohort", mode="before")
    @classmethod
    def _off_auto_or_some(cls, value: Any) -> Any:
        """YAML 1.1 reads off as a boolean."""
        value = "off" if value is False else value
        if value in {"off", "auto"} or (isinstance(value, int) and not isinstance(value, bool) and value >= 2):
            return value
        raise ValueError(f"train.cohort={value!r} is not valid: it is off, auto, or a number of clients from 2 on")

    @property
    def cohort_size(self) -> int:
        """Clients that train together, of a resolved recipe; 1 where each trains alone."""
        return self.cohort if isinstance(self.cohort, int) else 1

    @model_validator(mode="before")
    @classmethod
    def _default_steps(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "steps": 8}
        return values

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps={self.steps} and train.epochs={self.epochs} both say how long a client trains: keep one"
            )
        return self


class FederationConfig(Section):
    rounds: int = Field(6, ge=1, description="number of rounds")
    clients_per_round: int | float | None = Field(
        None, gt=0, description="clients sampled in a round: a number, or a fraction below 1.0; null takes all"
    )
    min_clients: int = Field(
        1,
        ge=1,
        description="the fewest updates a round needs; with fewer it waits for lost clients until round_deadline, then the "
        "run ends",
    )
    round_deadline: float | None = Field(
        None,
        gt=0,
        description="seconds that a site or a Ray actor has for one piece of work, late ones are dropped; null waits "
        "as long as it lives",
    )

    @field_validator("clients_per_round")
    @classmethod
    def _number_or_fraction(cls, value: int | float | None) -> int | float | None:
        if isinstance(value, float) and value >= 1 and not value.is_integer():
            raise ValueError(f"clients_per_round={value:g} is neither a whole number nor a fraction below 1")
        return int(value) if isinstance(value, float) and value >= 1 else value

    def sampled(self, clients: int) -> int:
        """Clients in a round, of so many that hold training data."""
        wanted = self.clients_per_round
        if wanted is None:
            return clients
        return max(1, round(wanted * clients)) if isinstance(wanted, float) else wanted


def _named(value: Any) -> Any:
    """A list of mappings with a name each, from bare names and mappings, or one of them alone."""
    if isinstance(value, str | Mapping):
        value = [value]
    return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


class OperatorConfig(Section):
    """`name`, and beside it the operator's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="the operator")


class OperatorsConfig(Section):
    """Chains of message operators, each a list of names or of mappings with a name and options."""

    initial: list[OperatorConfig] = Field(
        default_factory=list, description="what a client's first payload goes through: an emulator, the first broadcast"
    )
    up: list[OperatorConfig] = Field(default_factory=list, description="what an update goes through")
    down: list[OperatorConfig] = Field(default_factory=list, description="what later payloads go through")

    @field_validator("initial", "up", "down", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return _named(value)


class HookConfig(Section):
    """`name`, and beside it the hook's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="the hook")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RayConfig(Section):
    actors: int = Field(2, ge=1, description="processes that clients are shared out over; each loads the base model")
    cpus: float = Field(
        1.0, gt=0, description="CPUs that Ray sets aside for an actor, which are its threads; may be a fraction"
    )
    gpus: float = Field(0.0, ge=0, description="GPUs for an actor; 0.5 puts two actors on one")
    address: str | None = Field(
        None, description="a cluster of one owner that is there already (host:port, or auto); null starts Ray here"
    )


class RuntimeConfig(Section):
    name: str = Field("simulator", description="where the clients run")
    device: str = Field("auto", description="cpu, cuda, cuda:0 …; auto takes a GPU where there is one")
    threads: int | None = Field(
        None, ge=1, description="CPU threads, shared out among ranks; null takes the cores really available"
    )
    ranks: int = Field(1, ge=1, le=64, description="processes that train each client together, one for each GPU")
    parallel: Literal["ddp", "fsdp"] | None = Field(
        None,
        description="how: ddp shares out each step's examples; fsdp shards the frozen base besides; null is ddp",
    )
    speed_spread: float = Field(
        0.5,
        ge=0,
        le=5,
        description="under an asynchronous algorithm, how unlike simulated clients' speeds are: σ of their log",
    )
    ray: RayConfig = Field(default_factory=RayConfig, description="of the runtime ray alone")

    @model_validator(mode="after")
    def _parallel_needs_ranks(self) -> RuntimeConfig:
        if self.parallel is not None and self.ranks == 1:
            raise ValueError(
                f"runtime.parallel={self.parallel} says how ranks work together, but runtime.ranks=1: set runtime.ranks=2 "
                "or more, or leave it out"
            )
        return self

    @property
    def threads_of_a_rank(self) -> int:
        """Of a resolved recipe."""
        return max(1, (self.threads or 1) // self.ranks)


class EvaluationConfig(Section):
    every: int = Field(1, ge=0, description="evaluate after every k rounds, and always before and after; 0: only those")
    suite: str | None = Field(
        "auto", description="the paired evaluation; auto is the corpus's own, null scores nothing"
    )
    limit: int | None = Field(20, ge=1, description="questions scored for each task, over all clients; null: all")
    batch_size: int = Field(24, ge=1, description="sequences in one forward pass of evaluation and generation")
    max_new_tokens: int | None = Field(None, ge=1, description="longest generated answer; null: the suite's own")
    answers: int = Field(5, ge=0, description="test questions whose answers before and after stand in the report")


class TrackingConfig(Section):
    trackers: list[str] = Field(
        default_factory=list, description="trackers of accelerate.tracking that mirror the events, e.g. [tensorboard]"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many rounds' checkpoints are kept")


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
        return _named(value)

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
            set_dotted(merged, dotted, value)
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


def recipes_folder() -> Path:
    """The folder of the built-in recipes: inside an installed package, beside it in a checkout."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """Name → file of every built-in recipe, the quickstart first."""
    found = {path.stem: path for path in recipes_folder().glob("*.yaml")}
    return dict(sorted(found.items(), key=lambda item: (item[0] != "quickstart", item[0])))


def find_recipe(source: str | Path) -> Path:
    """The file behind a recipe's name, its path, or a run's folder. Raises UserError."""
    builtin = builtin_recipes()
    if str(source) in builtin:
        return builtin[str(source)]
    path = Path(source)
    if (path / "recipe.yaml").is_file():  # a run's folder: the recipe that it was run with
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"} or "/" in str(source):
        raise UserError(
            f"there is no recipe file {source}: give a YAML file, or a built-in name (see `fedloom recipes`)"
        )
    raise UserError(f"unknown recipe {str(source)!r}: {suggest(str(source), builtin)}")


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
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {where} in the recipe: {nearest_key(where, _valid_keys(Recipe))}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message[:1].isupper() else message
    if first["type"] == "value_error":
        return message
    return f"{where}={first['input']!r} is not valid: {message}"
