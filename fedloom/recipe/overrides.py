"""Parse recipe keys and values as people type them: `train.lr=1e-3` on a command line, a bare string for a section."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fedloom.common.errors import UserError
from fedloom.common.yaml import _Dumper, _Loader, load_yaml


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse ``["train.lr=1e-3"]`` → ``{"train.lr": 0.001}``; values are YAML. Raises UserError."""
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise UserError(f"cannot read {argument!r}: an override has the form key=value, such as train.lr=1e-3")
        try:
            values[key.strip()] = load_yaml(text)
        except yaml.YAMLError:
            raise UserError(f"cannot read the value of {argument!r}: it is not YAML") from None
    return values


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def nested_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: nested_copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


#: Section that may be a bare string → the key that the string sets.
_SHORTHAND = {"model": "name", "algorithm": "name"}


def set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    for i, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if isinstance(inner, str) and i == 0 and key in _SHORTHAND:
            inner = values[key] = {_SHORTHAND[key]: inner}
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise UserError(f"cannot set {dotted}: {'.'.join(keys[: i + 1])} is {inner!r} and has no keys of its own")
        values = inner
    last = keys[-1]
    if len(keys) == 1 and last in _SHORTHAND and isinstance(value, str) and isinstance(values.get(last), dict):
        values[last] = {**values[last], _SHORTHAND[last]: value}
        return
    # train.steps=… on the command line replaces a recipe's train.epochs, and vice versa.
    other = {"steps": "epochs", "epochs": "steps"}.get(last)
    if keys[:-1] == ["train"] and other and value is not None:
        values[other] = None
    values[last] = value


#: Key in Hugging Face, PEFT or Flower → the recipe's key.
KNOWN_AS = {
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "num_train_epochs": "train.epochs",
    "local_epochs": "train.epochs",
    "max_steps": "train.steps",
    "local_steps": "train.steps",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "max_grad_norm": "train.clip",
    "optim": "train.optimizer",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "peft_type": "adapter.method",
    "num_rounds": "federation.rounds",
    "num_server_rounds": "federation.rounds",
    "fraction_fit": "federation.clients_per_round",
    "min_fit_clients": "federation.min_clients",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "dataset": "data.corpus",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "nproc_per_node": "runtime.ranks",
    "num_processes": "runtime.ranks",
    "noise_multiplier": "privacy.noise",
    "target_epsilon": "privacy.epsilon",
    "target_delta": "privacy.delta",
    "clipping_norm": "privacy.clip",
}


def nearest_key(where: str, valid: Sequence[str]) -> str:
    """Return the end of a sentence about an unknown key: its name here, the nearest key, or its section's keys."""
    section, _, last = where.rpartition(".")
    alias = difflib.get_close_matches(last, KNOWN_AS, n=1, cutoff=0.9)
    siblings = [k for k in valid if k.rpartition(".")[0] == section]
    close = difflib.get_close_matches(where, siblings, n=1, cutoff=0.8)
    if not close and alias:
        close = [KNOWN_AS[alias[0]]]
    elsewhere = [k for k in valid if k.rpartition(".")[2] == last]
    close = close or elsewhere or difflib.get_close_matches(where, valid, n=1, cutoff=0.8)
    return f"did you mean {close[0]}?" if close else f"valid keys are {', '.join(siblings)}"
