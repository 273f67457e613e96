"""One algorithm with a tiny recipe: runs of it, and server halves to try updates on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedloom.algorithms.about import Sizes
from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.algorithms.base import Algorithm, Properties
from fedloom.algorithms.build import options_of
from fedloom.common import registry
from fedloom.experiment.run import run as run_recipe
from fedloom.federation.watch import Watch
from fedloom.messages.at_rest import load_tensors
from fedloom.messages.types import Update
from fedloom.models.attach import Models
from fedloom.models.layout import Layout
from fedloom.recipe.recipe import Recipe
from fedloom.testing.probe import Log, copied, probe


class Killed(BaseException):
    """Ends a run as suddenly as a signal: nothing may catch it."""


@dataclass
class Outcome:
    """A run that ended: what it left, and what was noted of the algorithm meanwhile.

    Attributes:
        bits: everything that two equal runs have in common: the adapter's digest, the losses, each personal adapter and
            each client's stored state.
    """

    folder: Path
    bits: dict[str, Any]
    log: Log


class Case:
    """
    Args:
        cls: the algorithm.
        recipe: names the algorithm by `name`; short runs of it are made.
        folder: an empty folder for the runs.
    """

    def __init__(self, cls: type[Algorithm], name: str, recipe: Recipe, folder: Path) -> None:
        self.cls, self.name, self.recipe, self.folder = cls, name, recipe, folder
        self._number = 0
        self.newest = Log()  # of the newest run, even one that failed

    @property
    def properties(self) -> Properties:
        return self.cls.properties

    def run(
        self,
        values: Mapping[str, Any] | None = None,
        *,
        kill: tuple[str, int, int] | None = None,
        resume: Path | None = None,
        **options: Any,
    ) -> Outcome:
        """Run the recipe, or the run in the folder `resume` to its end.

        Args:
            values: dotted keys that differ from the recipe.
            kill: (what, round, done): raise `Killed` when so many clients have done this in that round.
            options: of `probe`.
        """
        self._number += 1
        folder, self.newest = resume or self.folder / f"run-{self._number}", (log := Log())

        def tick(what: str, round: int, done: int, total: int) -> None:
            if (what, round, done) == kill:
                raise Killed

        recipe = self.recipe.with_values(dict(values or {}))
        with registry.algorithms.replaced(self.name, probe(self.cls, log, **options)):
            try:
                run_recipe(recipe, out=folder, resume=resume is not None, watch=Watch(tick=tick))
            except Killed:
                return Outcome(folder, {}, log)
        return Outcome(folder, bits(folder), log)

    @cached_property
    def whole(self) -> Outcome:
        """An undisturbed run. Checks read it and change nothing."""
        return self.run()

    def plain(self, values: Mapping[str, Any]) -> Outcome:
        """FedAvg with the same recipe."""
        recipe = self.recipe.with_values({"algorithm": {"name": "fedavg"}})
        return Case(FedAvg, "fedavg", recipe, self.folder / f"plain-{self._number}").run(values)

    @cached_property
    def models(self) -> Models:
        return Models(self.recipe.model, self.recipe.adapter, self.recipe.seed, "cpu")

    def server(self) -> Algorithm:
        """A new server half, as before the first round."""
        options = options_of(self.cls, self.recipe)
        made = self.cls(options, self.recipe.seed, self.recipe.adapter)
        made.server_model(self.models)
        return made

    def first_updates(self) -> list[Update]:
        """Copies of the updates of the whole run's first round."""
        return [replace(u, payload=copied(u.payload)) for u in self.whole.log.updates[0]]

    @cached_property
    def layout(self) -> Layout:
        """Of an adapter in the whole model, which is not what an algorithm that cuts the model trains."""
        plain = Models(self.recipe.model, self.recipe.adapter, self.recipe.seed, "cpu")
        return plain.adapted().adapter.layout

    def sizes(self, round: int) -> Sizes:
        clients = {client for client, _ in self.whole.log.up}
        steps = self.recipe.train.steps or 0
        options = options_of(self.cls, self.recipe)
        return Sizes(self.layout, self.recipe.adapter.rank, len(clients), round, steps, options)


def bits(folder: Path) -> dict[str, Any]:
    """What two runs with the same bits have in common."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [event["loss"] for event in map(json.loads, lines) if event["event"] == "evaluation"]
    tensors = {
        f"{path.relative_to(folder).as_posix()}:{n}": t.tolist()
        for path in sorted(folder.rglob("*.safetensors"))
        if "checkpoints" not in path.parts
        for n, t in load_tensors(path).items()
    }
    return {"adapter": summary["adapter_sha256"], "loss": summary["loss"], "last": losses[-1], **tensors}
