"""A site's policy: what recipes may do there. Only the site's processes read its file, and it is never sent.

A recipe that asks for more is rejected before any data are read. Only numbers and encoded payloads may leave. A failure
leaves as a code; its text stays in the site's log unless the site allows more. Each outgoing message is a line in the
site's audit log. This file does not know how a message travels.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from fedloom.common.complaints import first_complaint
from fedloom.common.errors import UserError
from fedloom.common.yaml import load_yaml
from fedloom.messages.types import Failure, Outcome
from fedloom.recipe.sections import Section

CODE = re.compile(r"[a-z][a-z_]{0,39}")


#: A string in an outgoing payload's metadata: a name or a digest, without blanks.
WORD = re.compile(r"[\w.:/+#%-]{0,200}", re.ASCII)


class Refused(ValueError):
    """The site rejects this. The sentence names the policy's key and has nothing of the site's data."""


class Policy(Section):
    """policy.yaml of a site. Every key has a default that suits a first run among partners who know each other."""

    algorithms: list[str] | None = Field(None, description="algorithms that may run here; null: every installed one")
    operators: list[str] | None = Field(None, description="operators that may encode messages; null: every one")
    methods: list[str] | None = Field(None, description="PEFT methods that may be trained here; null: every one")
    hooks: list[str] | None = Field(
        None, description="hooks that may act in this site's training; null: every installed one, []: none"
    )
    rounds: int | None = Field(None, ge=1, description="the most rounds that a recipe may have")
    ranks: int = Field(8, ge=1, description="the most processes that a recipe may have train together here")
    largest_epsilon: float | None = Field(
        None, gt=0, description="a recipe has to be private with an epsilon of at most this; null asks for no privacy"
    )
    error_text: bool = Field(False, description="whether the text of an error may leave, in addition to its code")
    max_message_bytes: int = Field(8 << 30, ge=1 << 20, description="the largest message that is taken")

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Load a site's policy, or the defaults if there is no file. Raises UserError."""
        try:
            values = load_yaml(path.read_text(encoding="utf-8")) or {}
            return cls.model_validate(values)
        except FileNotFoundError:
            return cls.model_validate({})
        except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
            first = first_complaint(error) if isinstance(error, ValidationError) else "it is not YAML"
            raise UserError(f"the policy {path} cannot be used: {first}") from None

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Raise Refused if a resolved recipe asks for more than this site allows."""
        self._among("algorithms", self.algorithms, [recipe["algorithm"]["name"]])
        self._among("methods", self.methods, [recipe["adapter"]["method"]])
        chains = recipe.get("operators") or {}
        self._among("operators", self.operators, [str(o["name"]) for chain in chains.values() for o in chain or []])
        self._among("hooks", self.hooks, [str(h["name"]) for h in recipe.get("hooks") or []])
        rounds = recipe["federation"]["rounds"]
        if self.rounds is not None and rounds > self.rounds:
            raise Refused(f"the recipe has {rounds} rounds and this site's policy allows {self.rounds} (rounds)")
        if self.largest_epsilon is not None:
            epsilon = (recipe.get("privacy") or {}).get("epsilon")
            if not isinstance(epsilon, int | float) or not 0 < epsilon <= self.largest_epsilon:
                asked = "no privacy.epsilon" if epsilon is None else f"privacy.epsilon={epsilon}"
                raise Refused(
                    f"the recipe has {asked} and this site's policy asks for at most {self.largest_epsilon:g} "
                    "(largest_epsilon)"
                )
        if recipe["model"].get("trust_remote_code"):
            raise Refused("the recipe asks for model.trust_remote_code, which no site grants")

    def ranks_of(self, recipe: Mapping[str, Any]) -> int:
        """Return how many processes a resolved recipe uses for training here. Raises Refused if that is too many."""
        wanted = recipe["runtime"].get("ranks", 1)
        if not isinstance(wanted, int) or not 1 <= wanted <= self.ranks:
            raise Refused(f"the recipe asks for {wanted} ranks and this site's policy allows {self.ranks} (ranks)")
        return wanted

    def _among(self, key: str, allowed: list[str] | None, wanted: list[str]) -> None:
        for name in wanted:
            if allowed is not None and name not in allowed:
                raise Refused(f"this site's policy does not allow {name} ({key}: {', '.join(allowed) or 'none'})")

    def outgoing(self, outcome: Outcome) -> Outcome:
        """Return the outcome as it may leave. Raises Refused if an update has anything except numbers and names."""
        if isinstance(outcome, Failure):
            reason = outcome.reason if CODE.fullmatch(outcome.reason) else "error"
            return replace(outcome, reason=reason, detail=self.words(outcome.detail))
        for name, value in outcome.metrics.items():
            if not WORD.fullmatch(name) or isinstance(value, bool) or not isinstance(value, int | float):
                raise Refused("an update's metrics have a value that is not a number")
        _only_words([*outcome.payload.tensors, outcome.payload.meta, outcome.payload.coding])
        return outcome

    def words(self, text: str) -> str:
        """Return an error's sentence as it may leave."""
        return text if self.error_text else "the site's log says more"


def _only_words(value: Any) -> None:
    """Raise Refused for a string that is not a name, in tensors' names, metadata and operators' notes."""
    if isinstance(value, str) and not WORD.fullmatch(value):
        raise Refused("an update has text where only names and numbers are allowed")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _only_words(key)
            _only_words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _only_words(item)


class Audit:
    """A site's audit.jsonl: one line for each message that left, with its size and digest, without its content."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def left(self, what: str, *data: bytes | bytearray | memoryview, **about: str | int) -> None:
        """Write the line of a message that left; `data` are its parts in order."""
        digest = hashlib.sha256()
        for part in data:
            digest.update(part)
        line = {
            "time": round(time.time(), 3),
            "what": what,
            **about,
            "bytes": sum(map(len, data)),
            "sha256": digest.hexdigest(),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
