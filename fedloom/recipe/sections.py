"""The recipe's plain sections: model, data, split, algorithm, federation, operators, hooks, runtime, evaluation,
tracking.

`adapter`, `train`, `privacy` and `devices` have their own files. The field descriptions are the help (docs/recipes.md).
Options of an algorithm, a hook or an operator are checked where they are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class ModelConfig(Section):
    name: str = Field("smollm2-135m", description="a built-in name, a folder, or a hub id of a causal language model")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the frozen base weights; the adapter is always float32"
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None,
        description="store the frozen base's linear layers in 8 or 4 bits (QLoRA); on a GPU this needs bitsandbytes. null "
        "stores them in dtype; products are computed in dtype either way",
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "flex"] = Field(
        "auto",
        description="kernel for packed batches: sdpa, a call for each sequence; flash_attention_2 and flex, one call on a "
        "GPU; auto is flash_attention_2 where it works",
    )
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    trust_remote_code: bool = Field(False, description="run code of a hub repository; off unless you ask")


class DataConfig(Section):
    corpus: str | None = Field(None, description="a corpus by name; null with `path` set uses your own file or hub id")
    path: str | None = Field(
        None, description="a .json, .jsonl, .csv or .parquet file (.gz too), a folder of them, or a hub id"
    )
    columns: dict[Literal["instruction", "input", "output", "category", "rejected"], str] | None = Field(
        None, description="role → column of your data, e.g. {instruction: question, output: answer}"
    )
    license: str | None = Field(None, description="the licence of your own data, written into the summary")
    max_length: int = Field(512, ge=8, description="most tokens of a sequence; longer ones are truncated and counted")
    limit: int | None = Field(
        None,
        ge=1,
        description="use at most this many examples, drawn at random with the seed (categories in proportion)",
    )
    template: Literal["auto", "chat", "alpaca", "plain"] = Field(
        "auto",
        description="how a prompt is written: the model's chat template, Alpaca's, or the bare text; "
        "auto uses chat if the tokenizer has a template, else alpaca",
    )
    system: str | None = Field(
        None, description="the system message under the chat template; null leaves it to the model's template"
    )

    @model_validator(mode="after")
    def _check_source(self) -> DataConfig:
        if self.corpus is None and self.path is None:
            raise ValueError("data needs a corpus or a path: set data.corpus=fed-skills or data.path=FILE")
        return self


class SplitConfig(Section):
    splitter: str | None = Field(
        None, description="uniform, dirichlet, meta, quantity, shards or natural; null: the corpus's own"
    )
    by: str = Field("category", description="the column that all splitters but uniform and quantity use")
    clusters: int | None = Field(
        None, ge=2, description="group texts by their words into this many groups, which replace the column `by`"
    )
    alpha: float | None = Field(
        None, gt=0, description="concentration of dirichlet and quantity, which need it: small is skewed, large is even"
    )
    shards: int = Field(2, ge=1, description="shards per client, for the splitter shards")
    num_clients: int | None = Field(
        None, ge=1, description="number of clients; null: the corpus's default, for meta one per value"
    )
    min_size: int = Field(
        1,
        ge=1,
        description="smallest number of training examples of a client; a split that gives a client fewer is refused",
    )
    validation: Fraction = Field(0.05, description="share of each client's examples held out for validation")
    test: Fraction = Field(0.1, description="share of each client's examples held out for the test")

    @model_validator(mode="after")
    def _check_shares(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"split.validation + split.test = {self.validation + self.test:g} leaves nothing to train on: "
                "keep their sum under 1"
            )
        return self


class AlgorithmConfig(Section):
    """The algorithm's `name`, and its own options next to it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("fedavg", description="the federated algorithm; its own options are next to its name")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def check_number_or_fraction(value: int | float | None, key: str) -> int | float | None:
    """Return an integer as an int, and a fraction below 1 as it is. Raises ValueError for anything else."""
    if isinstance(value, float) and value >= 1 and not value.is_integer():
        raise ValueError(f"{key}={value:g} is neither a whole number nor a fraction below 1")
    return int(value) if isinstance(value, float) and value >= 1 else value


def count_of(wanted: int | float | None, clients: int) -> int:
    """Return how many of `clients` a `check_number_or_fraction` means: null is all, a fraction at least one."""
    if wanted is None:
        return clients
    return max(1, round(wanted * clients)) if isinstance(wanted, float) else wanted


class FederationConfig(Section):
    rounds: int = Field(6, ge=1, description="number of rounds")
    clients_per_round: int | float | None = Field(
        None, gt=0, description="clients sampled per round: a number, or a fraction below 1.0; null takes all"
    )
    min_clients: int = Field(
        1,
        ge=1,
        description="smallest number of updates of a round; with fewer the round waits for lost clients until "
        "round_deadline, then the run ends",
    )
    round_deadline: float | None = Field(
        None,
        gt=0,
        description="seconds that a site or a Ray actor has for one piece of work; late updates are dropped; null waits "
        "as long as it lives",
    )

    @field_validator("clients_per_round")
    @classmethod
    def _check_number_or_fraction(cls, value: int | float | None) -> int | float | None:
        return check_number_or_fraction(value, "clients_per_round")

    def sampled(self, clients: int) -> int:
        """Return the number of clients in a round, of `clients` with training data."""
        return count_of(self.clients_per_round, clients)


def parse_named_items(value: Any) -> Any:
    """Normalise to a list of mappings with a name: from a list of names and mappings, or from one alone."""
    if isinstance(value, str | Mapping):
        value = [value]
    return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


class OperatorConfig(Section):
    """An operator's `name`, and its own options next to it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="the operator")


class OperatorsConfig(Section):
    """Chains of message operators, each a list of names or of mappings with a name and options."""

    initial: list[OperatorConfig] = Field(
        default_factory=list, description="for a client's first payload: an emulator, the first broadcast"
    )
    up: list[OperatorConfig] = Field(default_factory=list, description="for updates")
    down: list[OperatorConfig] = Field(default_factory=list, description="for later payloads to clients")

    @field_validator("initial", "up", "down", mode="before")
    @classmethod
    def _parse_names(cls, value: Any) -> Any:
        return parse_named_items(value)


class HookConfig(Section):
    """A hook's `name`, and its own options next to it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="the hook")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RayConfig(Section):
    actors: int = Field(2, ge=1, description="processes that run the clients; each loads the base model")
    cpus: float = Field(
        1.0, gt=0, description="CPUs that Ray reserves for an actor, which are its threads; may be a fraction"
    )
    gpus: float = Field(0.0, ge=0, description="GPUs for an actor; 0.5 puts two actors on one")
    address: str | None = Field(
        None, description="a running cluster with a single owner (host:port, or auto); null starts Ray here"
    )


class RuntimeConfig(Section):
    name: str = Field("simulator", description="where the clients run")
    device: str = Field("auto", description="cpu, cuda, cuda:0 …; auto uses a GPU if there is one")
    threads: int | None = Field(
        None, ge=1, description="CPU threads, divided among ranks; null uses the cores that are available"
    )
    ranks: int = Field(1, ge=1, le=64, description="processes that train each client together, one per GPU")
    parallel: Literal["ddp", "fsdp"] | None = Field(
        None,
        description="how ranks work together: ddp divides each step's examples; fsdp also shards the base; null is ddp",
    )
    speed_spread: float = Field(
        0.5,
        ge=0,
        le=5,
        description="for asynchronous algorithms, the short form of `devices`: the spread of clients' speeds, "
        "σ of their logarithm",
    )
    ray: RayConfig = Field(default_factory=RayConfig, description="settings of the runtime ray")

    @model_validator(mode="after")
    def _check_parallel(self) -> RuntimeConfig:
        if self.parallel is not None and self.ranks == 1:
            raise ValueError(
                f"runtime.parallel={self.parallel} says how ranks work together, but runtime.ranks=1: set runtime.ranks=2 "
                "or more, or leave it out"
            )
        return self

    @property
    def threads_of_a_rank(self) -> int:
        """The number of threads of a rank, of a resolved recipe."""
        return max(1, (self.threads or 1) // self.ranks)


class EvaluationConfig(Section):
    every: int = Field(1, ge=0, description="evaluate after every k rounds, and always before and after; 0: only those")
    suite: str | None = Field(
        "auto", description="the paired evaluation; auto is the corpus's own, null scores no answers"
    )
    clients: int | float | None = Field(
        None,
        gt=0,
        description="clients that are evaluated, drawn once with the seed: a number, or a fraction below 1.0; null "
        "evaluates all that have test data",
    )
    limit: int | None = Field(20, ge=1, description="questions scored per task, over all clients; null: all")
    batch_size: int = Field(24, ge=1, description="sequences in one forward pass of evaluation and generation")
    max_new_tokens: int | None = Field(None, ge=1, description="longest generated answer; null: the suite's own")
    answers: int = Field(5, ge=0, description="test questions whose answers before and after are in the report")

    @field_validator("clients")
    @classmethod
    def _check_number_or_fraction(cls, value: int | float | None) -> int | float | None:
        return check_number_or_fraction(value, "evaluation.clients")


class TrackingConfig(Section):
    trackers: list[str] = Field(
        default_factory=list, description="trackers of accelerate.tracking that mirror the events, e.g. [tensorboard]"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many rounds' checkpoints are kept")
